"""A rank of a pipeline reads and makes the tensors of its own layers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import vllm_moe_compat
from support import models
from support.layer_ranges import Hand
from vllm_moe_compat import demo
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.ranks.layer_range import Range


def load(path: Path, part: Range | None) -> tuple[Any, int]:
    """The model, and the bytes that were read."""
    me = psutil.Process()
    with vllm_moe_compat.applied(), loading_with(dtype="float32", at_once=True, arrange=part):
        before = me.io_counters().read_chars
        model, _ = load_model(path, lazy=True)
        if part is not None and not part.done:
            part.cut(model)
        mx.eval(model.parameters())
    return model, me.io_counters().read_chars - before


@pytest.mark.skipif(not psutil.LINUX, reason="counts of bytes read are Linux's")
@pytest.mark.parametrize("kind", ["demo", "qwen3_moe"])
def test_a_range_reads_its_layers(
    kind: str, demo_checkpoint: demo.DemoCheckpoint, tmp_path: Path
) -> None:
    path = demo_checkpoint.path
    if kind != "demo":
        path = models.write_mlx(tmp_path / "model", kind)
    load(path, None)  # Modules are imported.
    whole, everything = load(path, None)
    wanted = dict(tree_flatten(whole.parameters()))
    names = {id(module): name for name, module in whole.named_modules()}
    prefixes = [f"{names[id(layer)]}." for layer in whole.layers]
    stored = {
        name: array.nbytes
        for file in path.glob("*.safetensors")
        for name, array in mx.load(str(file)).items()  # type: ignore[union-attr]
    }
    for begin, end in ((0, 1), (1, 4)):
        part, read = load(path, Range(lambda _, b=begin, e=end: (b, e), Hand()))
        absent = tuple(prefixes[:begin] + prefixes[end:])
        kept = {name: array for name, array in wanted.items() if not name.startswith(absent)}
        found = dict(tree_flatten(part.parameters()))
        assert found.keys() == kept.keys()
        assert all(mx.array_equal(found[name], kept[name]) for name in kept)
        other = [number for number in range(len(prefixes)) if not begin <= number < end]
        unread = sum(
            size
            for name, size in stored.items()
            if any(f"model.layers.{n}." in name.replace("language_model.", "") for n in other)
        )
        assert read < everything - 0.9 * unread
