"""A prediction head has the tensors that its layer would have in the target."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, Cell, applies, build
from support.checkpoint_heads import add_head, layer_count
from support.loading import same_bits
from vllm_moe_compat.families.prediction_heads import HEADS_BY_MODULE
from vllm_moe_compat.load.prediction_heads import HeadParts, load_heads

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

DENSE_HEADS = ("ernie4_5_moe", "exaone_moe")
"""Families whose head is like the target's first layer; those of others are like the last."""
SHIFTED = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
DAILY = {
    ("qwen3_5_moe", "block FP8 128"),
    ("qwen3_5_moe", "int4"),
    ("qwen3_5", "release"),
    ("qwen3_next", "release"),
    ("qwen3_next", "block FP8 combined"),
    ("deepseek_v3", "GPTQ"),
    ("glm4_moe", "NVFP4"),
    ("ernie4_5_moe", "release"),
    ("exaone_moe", "per-tensor FP8"),
    ("kimi_k25", "combined"),
}
FORMS = (
    "saved",
    "release",
    "per-expert",
    "combined",
    "block FP8",
    "block FP8 128",
    "block FP8 combined",
    "per-tensor FP8",
    "int4",
    "int8 W8A8",
    "GPTQ",
    "AWQ",
    "NVFP4",
    "ModelOpt NVFP4 combined",
    "MXFP4",
)
ALIKE = [
    name
    for name in FAMILIES
    if FAMILIES[name].module in HEADS_BY_MODULE
    and name == FAMILIES[name].base
    and FAMILIES[name].module != "mimo_v2_flash"
]
CELLS = [
    pytest.param(
        family,
        form,
        marks=() if (family, form) in DAILY else pytest.mark.full,
        id=f"{family} {form}",
    )
    for family in ALIKE
    for form in FORMS
    if applies(FAMILIES[family], FORM_BY_NAME[form])
    and (family, form) != ("kimi_k25", "saved")  # Its layers have another name there.
]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def cell_of(family: str, form: str, **options: Any) -> tuple[Cell, int, dict[str, torch.Tensor]]:
    """Return a checkpoint with a head, the number of the layer it equals, and the other parts."""
    cell = build(FAMILIES[family], FORM_BY_NAME[form])
    layer = 0 if family in DENSE_HEADS else layer_count(cell.checkpoint.tensors) - 1
    apart = add_head(cell.checkpoint, FAMILIES[family].module, layer, **options)
    return cell, layer, apart


def heads(folder: Path, dtype: str = "float32") -> HeadParts:
    return load_heads(folder, dtype, lambda model: None)


def parameters(module: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


@pytest.mark.parametrize(("family", "form"), CELLS)
def test_the_layer_is_the_targets_own(family: str, form: str, tmp_path: Path):
    cell, layer, apart = cell_of(family, form)
    folder = cell.write(tmp_path)
    target, _ = mlx_lm.utils.load_model(folder)  # Strict: the head is left out.
    found = heads(folder)
    assert same_bits(parameters(found.decoder.layers[0]), parameters(target.layers[layer]))
    assert len(found.model.layers) == 1
    shift = 1.0 if family in SHIFTED else 0.0
    for part in ("embedding_norm", "hidden_norm", *(["norm"] if "norm" in apart else [])):
        wanted = apart[part].numpy() + shift
        assert np.array_equal(np.array(getattr(found, part).weight), wanted), part
    assert np.array_equal(np.array(found.join.weight), apart["join"].numpy())
    assert (found.norm is None) == ("norm" not in apart)
    assert found.embedding is None
    assert found.output is None


def test_the_parts_compute(tmp_path: Path):
    cell, _, _ = cell_of("qwen3_5_moe", "release")
    found = heads(cell.write(tmp_path))
    joined = found.join(mx.random.normal((2, 5, 128)))
    cache = found.model.make_cache()
    whole = found.decoder(joined)
    apart = [found.decoder(joined[:, at : at + 1], cache) for at in range(5)]
    assert found.norm is not None
    assert whole.shape == (2, 5, 64)
    assert np.allclose(np.array(whole), np.array(mx.concatenate(apart, 1)), atol=1e-5)
