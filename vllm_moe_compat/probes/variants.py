"""Write a recorded family's checkpoint in one of several forms.

A form is the release itself, or the release with its experts in another layout, its linear
layers in FP8, the config or the names that transformers 5 saves, or extra tensors.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.numbers.fp8_ops import WrittenFp8
from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.dtypes import mlx_dtype
from vllm_moe_compat.families.row import COMBINED, PER_EXPERT, TRANSPOSED, W123, Row
from vllm_moe_compat.plan.effective_config import effective_config
from vllm_moe_compat.probes.recipes import EVERY, Array, Family, Recipe
from vllm_moe_compat.rewrite.shards import Shards
from vllm_moe_compat.rewrite.written_layout import WrittenLayout

Config = dict[str, Any]
_SHARD_BYTES = 2**30
LINEAR = re.compile(
    r"(?!.*(vis|lm_head|embed|router|projector|index_))"
    r".*\.((q|k|v|o|out|qkv|gate|up|down|gate_up|in|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa"
    r"|in_proj_(qkvz|qkv|z)|c_fc|c_proj|w1|w2|w3|wq_b|wk|(input|output)_linear)\.weight"
)
"""The weights that FP8 releases convert: projections ``[O, I]`` of attention and MLP."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file.

    Attributes:
        dtype: safetensors' name.
        array: the values; FP8 as ``uint8``.
    """

    dtype: str
    array: mx.array


Tensors = dict[str, Array]


def write(folder: Path, family: Family, row: Row, form: str) -> Recipe | None:
    """Write the family's checkpoint in the form.

    Args:
        folder: an empty folder.
        family: the recorded family.
        row: the row of its module.
        form: a key of ``FORMS``.

    Returns:
        The recipe with the expected logits; None where the family has no such form.
    """
    made = FORMS[form](family, row)
    if made is None:
        return None
    recipe, stored, config = made
    specs = {name: Spec(tensor.dtype, tuple(tensor.array.shape)) for name, tensor in stored.items()}
    shards = Shards(folder, specs, _SHARD_BYTES, "pt")
    for name, tensor in stored.items():
        shards.write(name, tensor.array)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return recipe


Made = tuple[Recipe, dict[str, Stored], Config] | None


def _release(family: Family, row: Row) -> Made:
    recipe = family.release
    return recipe, _floats(dict(recipe.values())), _config(recipe)


def _saved(family: Family, row: Row) -> Made:
    if family.saved is None:
        return None
    return family.release, _floats(dict(family.release.values())), copy.deepcopy({**family.saved})


def _library(family: Family, row: Row) -> Made:
    recipe = family.library
    return None if recipe is None else (recipe, _floats(dict(recipe.values())), _config(recipe))


def _layout(layout: str, spelling: tuple[str, ...] = ()) -> Callable[[Family, Row], Made]:
    def make(family: Family, row: Row) -> Made:
        tensors = _laid_out(family, row, WrittenLayout(layout, spelling))
        if tensors is None:
            return None
        return family.release, _floats(tensors), _config(family.release)

    return make


def _fp8(block: tuple[int, int] | None, suffix: str, dtype: str) -> Callable[[Family, Row], Made]:
    """Convert linear layers to E4M3; block ``(1, 0)`` is a row, None the whole tensor."""

    def make(family: Family, row: Row) -> Made:
        tensors = dict(family.release.values())
        experts = _expert_names(tensors, family, row)
        if experts and not all(tensors[name].ndim == 2 for name in experts):
            laid_out = _laid_out(family, row, WrittenLayout(PER_EXPERT))
            assert laid_out is not None, "a family with experts has a per-expert layout"
            tensors = laid_out
            experts = _expert_names(tensors, family, row)
        stored = _floats(tensors)
        chosen = [
            name
            for name, value in tensors.items()
            if value.ndim == 2 and (name in experts or LINEAR.fullmatch(name))
        ]
        for name in chosen:
            values, scales = _quantize(tensors[name], block)
            stored[name] = values
            stored[name.removesuffix("weight") + suffix] = _encode(scales, dtype)
        if not chosen:
            return None
        config = _config(family.release)
        kept = {name.removesuffix(".weight") for name in tensors if name not in chosen}
        config["quantization_config"] = WrittenFp8(block or (0, 0)).quantization_config(kept)
        return family.release, stored, config

    return make


def _nested_vision(family: Family, row: Row) -> Made:
    """Add a vision tower under ``model.language_model``."""
    stored = _floats(dict(family.release.values()))
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        stored[f"model.language_model.visual.{name}"] = _encode(np.ones((8, 8), np.float32), "F32")
    return family.release, stored, _config(family.release)


def _narrow_norms(family: Family, row: Row) -> Made:
    """Store norms in bfloat16 and everything else in float32."""
    if row.norm_shift is None:
        return None
    tensors = dict(family.release.values())
    stored = _floats(tensors)
    for name, value in tensors.items():
        if name.endswith(row.norm_shift.suffixes):
            stored[name] = _encode(value, "BF16")
    return family.release, stored, _config(family.release)


def _own_head(family: Family, row: Row) -> Made:
    """Add an output head: the embeddings, shifted by the stride of the recorded logits."""
    recipe = family.release
    tensors = dict(recipe.values())
    (name,) = (name for name in tensors if name.endswith(f"{row.embedding}.weight"))
    if any(name.endswith("lm_head.weight") for name in tensors):
        return None
    stored = _floats(tensors | {"lm_head.weight": np.roll(tensors[name], -EVERY, axis=0)})
    config = _config(recipe) | {"tie_word_embeddings": False}
    return replace(recipe, logits=(*recipe.logits[1:], recipe.logits[0])), stored, config


FORMS: dict[str, Callable[[Family, Row], Made]] = {
    "release": _release,
    "saved config": _saved,
    "in-library": _library,
    "per-expert": _layout(PER_EXPERT),
    "per-expert w1/w2/w3": _layout(PER_EXPERT, W123),
    "combined": _layout(COMBINED),
    "combined transposed": _layout(TRANSPOSED),
    "block FP8 128": _fp8((128, 128), "weight_scale_inv", "BF16"),
    "block FP8": _fp8((32, 32), "weight_scale_inv", "F32"),
    "per-channel FP8": _fp8((1, 0), "weight_scale", "F32"),
    "per-tensor FP8": _fp8(None, "weight_scale_inv", "F32"),
    "nested vision tower": _nested_vision,
    "bfloat16 norms": _narrow_norms,
    "own output head": _own_head,
}
"""Form → its writer. The library form has expected logits of its own."""


def _config(recipe: Recipe) -> Config:
    return copy.deepcopy({**recipe.config})


def _infos(tensors: Mapping[str, Array]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", value.shape, "") for name, value in tensors.items()}


def _expert_names(tensors: Mapping[str, Array], family: Family, row: Row) -> set[str]:
    if row.moe is None:
        return set()
    layout = detect(_infos(tensors), family.release.config, row.ignored)
    return {name for block in layout.experts for name in block.names()}


def _laid_out(family: Family, row: Row, form: WrittenLayout) -> Tensors | None:
    """Return the tensors with the routed experts in another layout."""
    from vllm_moe_compat.errors import SettingError, UnsupportedCheckpointError
    from vllm_moe_compat.rewrite.run_rewrite import rewrite

    tensors = dict(family.release.values())
    if not _expert_names(tensors, family, row):
        return None
    config = effective_config(_config(family.release)).config
    weights = {name: mx.array(value) for name, value in tensors.items()}
    try:
        made = rewrite(weights, row, config, form, tensors=_infos(tensors), dtype="float32")
        found = {name: np.array(value) for name, value in made}
    except (SettingError, UnsupportedCheckpointError):
        return None
    # The rewrite leaves tensors that no module reads in the dict.
    return found | {name: np.array(value) for name, value in weights.items()}


def _quantize(matrix: Array, block: tuple[int, int] | None) -> tuple[Stored, Array]:
    """Return E4M3 and scales whose product is the matrix ``[O, I]``, exactly.

    Scales are powers of two, and differ from block to block.
    """
    rows, columns = matrix.shape
    height, width = block or (rows, columns)
    width = width or columns
    grid = (-(-rows // height), -(-columns // width))
    largest = np.frexp(np.abs(matrix).max())[1] - 1
    shift = 7 - (np.arange(grid[0] * grid[1]) * 3 % 8).reshape(grid)
    scale = np.ldexp(np.float32(1), largest - shift).astype(np.float32)
    wide = scale.repeat(height, 0).repeat(width, 1)[:rows, :columns]
    values = mx.to_fp8(mx.array(matrix / wide))
    assert mx.array_equal(mx.from_fp8(values, mx.float32) * mx.array(wide), mx.array(matrix))
    return Stored("F8_E4M3", values), scale if block else scale.reshape(())


def _floats(tensors: Mapping[str, Array]) -> dict[str, Stored]:
    return {name: _encode(value, "F32") for name, value in tensors.items()}


def _encode(value: NDArray[Any], dtype: str) -> Stored:
    """Encode values that the dtype, ``F32`` or ``BF16``, represents exactly."""
    exact = mx.array(np.asarray(value, np.float32))
    encoded = exact.astype(mlx_dtype(dtype))
    assert mx.array_equal(encoded.astype(mx.float32), exact), f"{dtype} must hold the values"
    return Stored(dtype, encoded)
