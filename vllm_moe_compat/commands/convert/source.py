"""The tensors and the config that a conversion writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from vllm_moe_compat.checkpoint.operations import Spec


def _nothing(folder: Path) -> None:
    return None


@dataclass(slots=True)
class Source:
    """A checkpoint to be written.

    Attributes:
        specs: every tensor, in the order of the files.
        stream: yields the tensors one at a time, in any order, without keeping them; those of
            the given names are left out, and not made unless they are made with others.
        save_config: writes ``config.json`` into a folder.
        kind: ``format`` in the headers' metadata: ``mlx`` or ``pt``.
        form: the result in words.
        read: size in bytes of the source's tensors.
        notes: remarks for the user of the result.
        check: inspects the folder when the headers and the config are written and the
            values are not; may add to ``notes`` and may refuse.
    """

    specs: Mapping[str, Spec]
    stream: Callable[[Collection[str]], Iterator[tuple[str, mx.array]]]
    save_config: Callable[[Path], None]
    kind: str
    form: str
    read: int
    notes: list[str] = field(default_factory=list)
    check: Callable[[Path], None] = _nothing
