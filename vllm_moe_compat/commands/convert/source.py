"""What a conversion is given to write, whichever way it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from vllm_moe_compat.checkpoint.operations import Spec


def _nothing(folder: Path) -> None:
    return None


@dataclass(slots=True)
class Source:
    """A checkpoint that is about to be written.

    Attributes:
        specs: every tensor, in the order that the files will have.
        stream: makes them one after the other, in any order, and keeps none.
        save_config: writes ``config.json`` into a folder.
        kind: what ``format`` says in the headers: ``mlx`` or ``pt``.
        form: the result in words.
        read: bytes of what is read.
        notes: what whoever uses the result should know.
        check: looks at the folder once all headers and the config are in it and no
            value is; may add to ``notes``, and refuse.
    """

    specs: Mapping[str, Spec]
    stream: Callable[[], Iterator[tuple[str, mx.array]]]
    save_config: Callable[[Path], None]
    kind: str
    form: str
    read: int
    notes: list[str] = field(default_factory=list)
    check: Callable[[Path], None] = _nothing
