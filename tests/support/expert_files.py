"""A checkpoint with a file for each expert of one layer, and faults done to such files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import models

LAYER = 2
CONTAINER = f"model.layers.{LAYER}.mlp.switch_mlp"


def write(path: Path, tokenizer_from: Path) -> Path:
    """Write a random model of 16 experts, of which a token needs 2, in float32."""
    from safetensors.torch import load_file, save_file

    models.write(path, "qwen3_moe of 16 experts", tokenizer_from, dtype="float32")
    (whole,) = path.glob("model*.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    files: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        _, is_expert, rest = name.partition(f"layers.{LAYER}.mlp.experts.")
        file = file_of(int(rest.partition(".")[0])) if is_expert else "model-others.safetensors"
        files.setdefault(file, {})[name] = tensor
    for file, part in files.items():
        save_file(part, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def file_of(expert: int) -> str:
    return f"model-expert-{expert:02}.safetensors"


def truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def overwrite(file: Path) -> None:
    """Other values in the same file, by somebody who copies over it."""
    data = bytearray(file.read_bytes())
    data[-4096:] = bytes(4096)
    with file.open("r+b") as opened:
        opened.write(data)


def replace(file: Path) -> None:
    """Another file of the same name, as a download makes it."""
    other = file.with_suffix(".other")
    other.write_bytes(file.read_bytes()[:-4096] + bytes(4096))
    os.replace(other, file)


def remove(file: Path) -> None:
    file.unlink()


FAULTS: tuple[Callable[[Path], None], ...] = (truncate, overwrite, replace, remove)


@contextmanager
def broken(file: Path, fault: Callable[[Path], None]) -> Iterator[None]:
    """Do ``fault`` to a file; afterwards it is as it was, also to whoever looks at its times."""
    kept = file.with_suffix(".kept")
    os.link(file, kept)
    data, times = file.read_bytes(), file.stat()
    try:
        fault(file)
        yield
    finally:
        os.replace(kept, file) if not file.exists() or not file.samefile(kept) else kept.unlink()
        if file.read_bytes() != data:
            with file.open("r+b") as opened:
                opened.write(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
