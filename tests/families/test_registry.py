"""The map is explicit and made of what upstream really has; stock still needs its rows.

What needs transformers as an oracle is in tests/parity/test_still_needed.py.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
import torch
from mlx_lm.models import dbrx, glm4_moe, phi3, qwen3_5, qwen3_5_moe, solar_open

import vllm_moe_compat
from support.checkpoints import build
from support.loading import load, new_model
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE, row_for, row_of_model_type
from vllm_moe_compat.families.row import Moe, Workaround

ROWS = list(TRANSFORMS_BY_MODULE.values())


def row(module: str) -> Any:
    return TRANSFORMS_BY_MODULE[f"mlx_lm.models.{module}"]


def test_rows_are_found_by_their_module():
    assert list(TRANSFORMS_BY_MODULE) == [row.module for row in ROWS]
    assert row("qwen3_5").moe is None
    assert row("qwen3_5_moe").moe == Moe(stacks=("combined",))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module)
def test_a_row_names_a_class_that_can_be_wrapped(row):
    """It may have no sanitize, and then gets one; it may be another module's class."""
    model = importlib.import_module(row.module).Model
    sanitize = getattr(model, "sanitize", None)
    assert sanitize is None or callable(sanitize)
    found = row_for(model)
    assert found is TRANSFORMS_BY_MODULE[model.__module__]
    assert found is row or model.__module__ != row.module


def test_a_class_that_two_modules_share_is_its_owners():
    """Solar-Open's config has a row of its own; its tensors are GLM-4's."""
    assert solar_open.Model is glm4_moe.Model
    assert row_for(solar_open.Model) is row("glm4_moe")
    assert row_of_model_type({"model_type": "solar_open"}, {}) is row("solar_open")
    ours, owners = row("solar_open"), row("glm4_moe")
    assert (ours.moe, ours.dropped_upstream, ours.digests) == (
        owners.moe,
        owners.dropped_upstream,
        owners.digests,
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module)
def test_a_workaround_says_why_where_and_until_when(row):
    assert len(set(row.workarounds)) == len(row.workarounds)
    for workaround in row.workarounds:
        assert all((workaround.id, workaround.why, workaround.remove_when, workaround.form)), (
            workaround
        )
        assert workaround.upstream.startswith(("https://", "mlx_lm/"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module)
def test_a_row_without_workarounds_would_be_none(row):
    """But for a row that says whose FP8 and FP4 are not ours to read."""
    assert row.workarounds or row.keeps == ("fp8", "mxfp4")
    if row.translations or row.defaults:
        assert "config" in {w.id for w in row.workarounds}
    assert bool(row.renames or row.splits) == ("names" in {w.id for w in row.workarounds})


def test_a_workaround_is_shared_by_id():
    by_id: dict[str, Workaround] = {}
    for row in ROWS:
        for workaround in row.workarounds:
            assert by_id.setdefault(workaround.id, workaround) is workaround


def test_a_config_finds_its_row_by_every_name_that_it_goes_by():
    remapping = mlx_lm.utils.MODEL_REMAPPING
    for kind, module in {
        "qwen3_5_moe": "qwen3_5_moe",
        "qwen3_5_moe_text": "qwen3_5_moe",
        "mistral": "llama",
        "minimax_m2": "minimax",
        "step3p7": "step3p5",
        "hunyuan_v1_moe": "hunyuan",
        "hunyuan": "hunyuan",
    }.items():
        assert row_of_model_type({"model_type": kind}, remapping) is row(module), kind
    for kind in ("dbrx", "", None, 7, ["llama"]):
        assert row_of_model_type({"model_type": kind}, remapping) is None


def test_inner_and_unmapped_models_have_no_row():
    assert row_for(qwen3_5.TextModel) is None
    assert row_for(dbrx.Model) is None


def test_a_class_with_its_own_sanitize_needs_its_own_row():
    class Own(qwen3_5_moe.Model):
        def sanitize(self, weights):
            return weights

    class Heir(phi3.Model):
        pass

    class OwnOfNone(phi3.Model):
        sanitize = Own.sanitize

    assert row_for(Own) is None
    assert row_for(Heir) is row("phi3")
    assert row_for(OwnOfNone) is None


def gone(workaround: str) -> str:
    rows = ", ".join(r.module for r in ROWS if workaround in {w.id for w in r.workarounds})
    return (
        f"mlx-lm {mlx_lm.__version__} does this by itself now, so look into the workaround "
        f"{workaround!r}, used by {rows}; delete it from workarounds.py and its rows, its "
        "part of plan/norms.py or of the rows' dropped_here, and this test"
    )


@pytest.mark.compat
@pytest.mark.parametrize("dense", [False, True])
def test_stock_mlx_lm_still_refuses_a_nested_vision_tower(dense: bool, tmp_path: Path):
    vllm_moe_compat.revert()
    checkpoint = build("combined", dense=dense)
    load(checkpoint.write(tmp_path / "without"))
    checkpoint.tensors["model.language_model.visual.norm.weight"] = torch.ones(4)
    path = checkpoint.write(tmp_path / "with")
    try:
        with pytest.raises(ValueError, match="not in model"):
            load(path)
    except pytest.fail.Exception:
        pytest.fail(gone("nested-vision"))


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
QWEN3_NEXT = SMALL | {
    "model_type": "qwen3_next",
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 8,
    "mlp_only_layers": [],
    "moe_intermediate_size": 8,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "head_dim": 32,
}
STEP = SMALL | {
    "model_type": "step3p5",
    "num_attention_groups": 1,
    "head_dim": 32,
    "attention_other_setting": {"num_attention_heads": 2, "num_attention_groups": 1},
    "moe_layers_enum": "",
}
QWEN3_5 = "model.language_model.layers.0."
EXPERT = {
    f"model.layers.0.mlp.experts.0.{p}_proj.weight": mx.zeros((8, 8))
    for p in ("gate", "up", "down")
}
# Module → config, a norm's name before and after, and what marks an original checkpoint.
SHIFTS = {
    "qwen3_5_moe": (
        build("combined").config,
        f"{QWEN3_5}input_layernorm.weight",
        "language_model.model.layers.0.input_layernorm.weight",
        {f"{QWEN3_5}linear_attn.conv1d.weight": mx.zeros((8, 1, 4))},
    ),
    "qwen3_5": (
        build(dense=True).config,
        f"{QWEN3_5}input_layernorm.weight",
        "language_model.model.layers.0.input_layernorm.weight",
        {f"{QWEN3_5}linear_attn.conv1d.weight": mx.zeros((8, 1, 4))},
    ),
    "qwen3_next": (QWEN3_NEXT, *["model.layers.0.input_layernorm.weight"] * 2, EXPERT),
    "step3p5": (
        STEP,
        *["model.layers.0.input_layernorm.weight"] * 2,
        {"model.layers.0.moe.gate.weight": mx.zeros((1, 8))},
    ),
}


def test_every_row_that_shifts_norms_is_checked():
    assert SHIFTS.keys() == {
        row.module.rpartition(".")[2] for row in ROWS if row.norm_shift is not None
    }
    for row in ROWS:
        assert (row.norm_shift is not None) == ("norm-shift" in {w.id for w in row.workarounds})


@pytest.mark.compat
@pytest.mark.parametrize("module", SHIFTS)
def test_stock_mlx_lm_still_shifts_norms_in_the_checkpoints_dtype(module: str):
    """Silently: the load succeeds, and 1 + w is rounded to bfloat16."""
    vllm_moe_compat.revert()
    config, before, after, mark = SHIFTS[module]
    weights = {before: mx.full(8, 2**-10, mx.bfloat16), **mark}
    shifted = new_model(config).sanitize(weights)[after]
    assert shifted.tolist() == [1.0] * 8, gone("norm-shift")
