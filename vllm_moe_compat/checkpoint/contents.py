"""Compare small tensors that repeat what headers say with what they have to be.

Some forms store the shape of a weight as a tensor (``weight_shape``). A plan relies on headers
alone, so a tensor that contradicts them means that writer and reader disagree. There is one for
each weight, scattered over the files, so at most ``MOST`` are read before a load, evenly; the
load compares all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from vllm_moe_compat.checkpoint.findings import Finding
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers import Numbers

MOST = 2048
"""Tensors that are read; 2,048 take a fifth of a second."""


def check_contents(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    numbers: Numbers,
    stored: Mapping[str, str] | None = None,
) -> Iterator[Finding]:
    """Yield the small tensors whose numbers differ from what they have to be.

    Args:
        folder: the checkpoint's folder.
        tensors: its tensors.
        numbers: their stored number forms.
        stored: name → name in the file, if other tensors may have these names there; tensors
            without an entry are left to the load.
    """
    for found in numbers.found:
        wanted = dict(found.contents())
        step = -(-len(wanted) // MOST)
        names = [name for name in list(wanted)[:: max(step, 1)] if tensors[name].file]
        in_file = {
            name if stored is None else stored[name]: name
            for name in names
            if stored is None or name in stored
        }
        files = {name: tensors[own].file for name, own in in_file.items()}
        for other, held in _read(folder, files):
            name = in_file[other]
            if held != wanted[name]:
                topic = found.form.name
                yield Finding(name, f"is {list(held)}", f"{list(wanted[name])}", topic=topic)


def _read(folder: Path, file_of: Mapping[str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield integer tensors; a file that has gone is left to the load, which names it."""
    from safetensors import SafetensorError, safe_open

    files: dict[str, list[str]] = {}
    for name, file in file_of.items():
        files.setdefault(file, []).append(name)
    for file, inside in files.items():
        try:
            with safe_open(folder / file, framework="numpy") as shard:
                stored = set(shard.keys())
                # Names may have been changed since; the load compares those.
                for name in filter(stored.__contains__, inside):
                    yield name, tuple(int(n) for n in shard.get_tensor(name).ravel())
        except (SafetensorError, OSError):
            continue
