"""A checkpoint that changes while it is loaded is refused, never a mixture of two."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm.utils
import pytest

import vllm_moe_compat
from support.checkpoints import Fp8, Sizes, build
from vllm_moe_compat.backend.model import loader
from vllm_moe_compat.errors import CheckpointFileError

SIZES = Sizes(hidden=128, intermediate=64, experts=8)
SHARD = "model-00002-of-00002.safetensors"


def replace(path: Path, other: Path) -> None:
    """As a download does: another revision, whose files have the same names and sizes."""
    shutil.copyfile(other / SHARD, path / "incomplete")
    os.replace(path / "incomplete", path / SHARD)


def overwrite(path: Path, other: Path) -> None:
    with (path / SHARD).open("r+b") as shard:
        shard.write((other / SHARD).read_bytes())


def remove(path: Path, other: Path) -> None:
    (path / SHARD).unlink()


def add(path: Path, other: Path) -> None:
    shutil.copyfile(other / SHARD, path / "model-00003-of-00003.safetensors")


CHANGES: list[tuple[Callable[[Path, Path], None], str]] = [
    (replace, f"{SHARD}: when it was loaded there was [0-9,]+ bytes"),
    (overwrite, f"{SHARD}: when it was loaded there was [0-9,]+ bytes"),
    (remove, f"{SHARD}: .*and now there is none; something is writing"),
    (add, "model-00003-of-00003.safetensors: when it was loaded there was no such file"),
]


@pytest.mark.parametrize(
    ("change", "words"), CHANGES, ids=lambda value: getattr(value, "__name__", None)
)
def test_between_its_headers_and_its_values(
    change: Callable[[Path, Path], None], words: str, tmp_path: Path
) -> None:
    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path / "checkpoint")
    other = build(fp8=Fp8(), sizes=SIZES, seed=7).write(tmp_path / "other")

    def classes(config: dict[str, Any]) -> Any:
        # mlx-lm asks when it has opened the shards and read nothing of them.
        change(path, other)
        return mlx_lm.utils._get_classes(config)

    with vllm_moe_compat.applied(), pytest.raises(CheckpointFileError, match=words):
        mlx_lm.utils.load_model(path, get_model_classes=classes)


@pytest.mark.parametrize("change", [replace, overwrite])
def test_before_the_server_has_read_what_mlx_lm_leaves_for_later(
    change: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats in the module's own layout have no plan, and are read at the end."""
    path = build("combined", sizes=SIZES).write(tmp_path / "checkpoint")
    other = build("combined", sizes=SIZES, seed=7).write(tmp_path / "other")
    original = loader.keep_scales

    def keep_scales(*args: Any) -> Any:
        change(path, other)
        return original(*args)

    monkeypatch.setattr(loader, "keep_scales", keep_scales)
    with vllm_moe_compat.applied(), pytest.raises(CheckpointFileError, match=SHARD):
        loader.load(str(path), None, loader.mx.float32)
