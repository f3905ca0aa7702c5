"""The map is complete, explicit and made of what upstream really has."""

from __future__ import annotations

import importlib
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from mlx_lm.models import qwen3, qwen3_5, qwen3_5_moe

import vllm_moe_compat
from support.checkpoints import Checkpoint, Fp8, build
from support.loading import load, new_model
from vllm_moe_compat.registry import TRANSFORMS_BY_MODULE, row_for

ROWS = list(TRANSFORMS_BY_MODULE.values())


def test_the_two_modules_are_mapped():
    assert set(TRANSFORMS_BY_MODULE) == {
        "mlx_lm.models.qwen3_5",
        "mlx_lm.models.qwen3_5_moe",
    }
    assert TRANSFORMS_BY_MODULE["mlx_lm.models.qwen3_5"].moe is None
    assert TRANSFORMS_BY_MODULE["mlx_lm.models.qwen3_5_moe"].moe is not None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module)
def test_a_row_names_a_class_that_can_be_wrapped(row):
    module = importlib.import_module(row.module)
    assert callable(module.Model.sanitize)
    assert row_for(module.Model) is row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module)
def test_a_workaround_says_why_where_and_until_when(row):
    assert row.workarounds
    for workaround in row.workarounds:
        assert all((workaround.id, workaround.why, workaround.remove_when, workaround.form)), (
            workaround
        )
        assert workaround.upstream.startswith(("https://", "mlx_lm/"))


def test_a_workaround_is_shared_by_id():
    by_id: dict[str, object] = {}
    for row in ROWS:
        for workaround in row.workarounds:
            assert by_id.setdefault(workaround.id, workaround) is workaround


def test_inner_and_unmapped_models_have_no_row():
    assert row_for(qwen3_5.TextModel) is None
    assert row_for(qwen3.Model) is None


def test_a_class_with_its_own_sanitize_needs_its_own_row():
    class Own(qwen3_5_moe.Model):
        def sanitize(self, weights):
            return weights

    assert row_for(Own) is None


def nested_vision() -> Checkpoint:
    checkpoint = build("combined")
    checkpoint.tensors["model.language_model.visual.norm.weight"] = torch.ones(4)
    return checkpoint


NEEDED = {
    "block-fp8": [lambda: build("combined", Fp8()), lambda: build(fp8=Fp8(), dense=True)],
    "stack-experts": [lambda: build("per-expert")],
    "nested-vision": [nested_vision],
}


def test_every_workaround_has_a_checkpoint_that_needs_it():
    assert {*NEEDED, "norm-shift"} == {w.id for row in ROWS for w in row.workarounds}


@pytest.mark.compat
@pytest.mark.parametrize(
    ("workaround", "make"), [(name, make) for name, makes in NEEDED.items() for make in makes]
)
def test_stock_mlx_lm_still_needs_the_workaround(workaround: str, make, tmp_path: Path):
    vllm_moe_compat.revert()
    path = make().write(tmp_path)
    try:
        with pytest.raises(ValueError, match="not in model"):
            load(path)
    except pytest.fail.Exception:
        pytest.fail(
            f"mlx-lm loads this by itself now: look into removing {workaround!r} from registry.py"
        )


@pytest.mark.compat
def test_stock_mlx_lm_still_shifts_norms_in_the_checkpoints_dtype():
    """Silently: the load succeeds, and 1 + w is rounded to bfloat16."""
    vllm_moe_compat.revert()
    model = new_model(build("combined").config)
    norm = "model.layers.0.input_layernorm.weight"
    weights = {
        f"model.language_model.{norm.removeprefix('model.')}": mx.full(8, 2**-10, mx.bfloat16),
        "model.language_model.layers.0.linear_attn.conv1d.weight": mx.zeros((8, 1, 4)),
    }
    shifted = model.sanitize(weights)[f"language_model.{norm}"]
    assert shifted.tolist() == [1.0] * 8, "look into removing 'norm-shift' from registry.py"
