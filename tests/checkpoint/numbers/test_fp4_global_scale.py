"""Layers with NVFP4's global scale: loaded, saved, converted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

import vllm_moe_compat
from parity.verdict import judge, stock
from support.fp4 import LAYER, MLX_GLOBAL, cell
from support.loading import TOKENS, load, parameters, same_bits
from vllm_moe_compat.commands.convert.conversion import Options, convert
from vllm_moe_compat.families.global_scale import take_global_scale
from vllm_moe_compat.rewrite.written_layout import LAYOUTS, WrittenLayout

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.fixture(autouse=True)
def _hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def layers(dtype: mx.Dtype) -> tuple[Any, Any, mx.array, mx.array]:
    """A linear layer and one of experts with a global scale, and their values."""
    mx.random.seed(2)
    linear, experts = nn.Linear(64, 48, bias=True), SwitchLinear(64, 48, 3, bias=True)
    for module in (linear, experts):
        module.bias = mx.random.normal(module.bias.shape).astype(dtype)
        take_global_scale(module)
    made, values = [], []
    for module in (linear, experts):
        *lead, _, _ = module.weight.shape
        layer = module.to_quantized(16, 4, "nvfp4", global_scale=True)
        shared = 1e-4 * (1 + mx.random.uniform(shape=tuple(lead)))
        layer.weight, layer.scales = mx.quantize(400 * module.weight, 16, 4, mode="nvfp4")
        layer.global_scale = MLX_GLOBAL * shared
        plain = mx.dequantize(layer.weight, layer.scales, None, 16, 4, "nvfp4", dtype=mx.float32)
        made.append(layer)
        values.append(plain * shared[..., None, None])
    return made[0], made[1], values[0], values[1]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float32, 2e-6), (mx.bfloat16, 3e-2), (mx.float16, 2e-3)]
)
def test_layers_multiply_by_their_global_scale(dtype: mx.Dtype, tolerance: float):
    linear, experts, weight, weights = layers(dtype)
    x = mx.random.normal((5, 64)).astype(dtype)
    found = linear(x)
    assert found.dtype == dtype
    wanted = x.astype(mx.float32) @ weight.T + linear.bias
    assert mx.abs(found - wanted).max() < tolerance * mx.abs(wanted).max()
    chosen = mx.array([[2, 0], [1, 2], [0, 1], [2, 1], [0, 2]])
    found = experts(x[:, None, None], chosen)[:, :, 0]
    assert found.dtype == dtype
    wanted = mx.stack(
        [
            mx.stack([x[n].astype(mx.float32) @ weights[e].T + experts.bias[e] for e in row])
            for n, row in enumerate(chosen.tolist())
        ]
    )
    assert mx.abs(found - wanted).max() < tolerance * mx.abs(wanted).max()


def test_a_product_without_the_global_scale_would_overflow_in_float16():
    linear, *_ = layers(mx.float16)
    linear.scales = mx.full(linear.scales.shape, 0x70, dtype=mx.uint8)  # 128
    x = mx.full((1, 64), 300, dtype=mx.float16)
    found = linear(x)
    plain = mx.quantized_matmul(x, linear.weight, linear.scales, None, True, 16, 4, mode="nvfp4")
    assert mx.isinf(plain).any()
    assert mx.isfinite(found).all()


def test_other_layers_and_other_models_keep_their_classes():
    embedding, plain = nn.Embedding(8, 64), nn.Linear(64, 48)
    take_global_scale(embedding)
    assert type(embedding) is nn.Embedding
    take_global_scale(plain)
    assert type(plain.to_quantized(64, 4)) is nn.QuantizedLinear
    assert type(nn.Linear(64, 48)) is nn.Linear


def test_a_loaded_model_that_mlx_lm_saves_loads_again(tmp_path: Path):
    made = cell("qwen3_moe", "NVFP4")
    model, config = mlx_lm.utils.load_model(made.write(tmp_path / "source"))
    assert isinstance(model.model.layers[0].mlp.switch_mlp.up_proj, QuantizedSwitchLinear)
    wanted = model(mx.array([TOKENS]))
    target = tmp_path / "saved"
    mlx_lm.utils.save_model(target, model)
    mlx_lm.utils.save_config(config, target / "config.json")
    again = load(target)
    assert same_bits(parameters(again), parameters(load(tmp_path / "source")))
    assert mx.array_equal(again(mx.array([TOKENS])), wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("form", ["NVFP4", "MXFP4", "ModelOpt FP8 and NVFP4"])
def test_stock_mlx_lm_loads_what_is_converted(family: str, form: str, tmp_path: Path):
    made = cell(family, form)
    options = Options(dtype="float32")
    report = convert(made.write(tmp_path / "source"), tmp_path / "converted", options)
    widened = [note for note in report.notes if "are written as floats" in note]
    # Shared experts are linear layers.
    assert bool(widened) == (form == "NVFP4" or (family == "deepseek_v3" and "NVFP4" in form))
    ours = parameters(load(tmp_path / "source"))
    with stock():
        model, _ = mlx_lm.utils.load_model(tmp_path / "converted")
    found = parameters(model)
    experts = [name for name in found if ".switch_mlp." in name]
    assert family == "llama" or experts
    assert all(same_bits({"": found[n]}, {"": ours[n]}) for n in experts)
    if form == "NVFP4" and family != "llama":
        assert any(name.endswith(".global_scale") for name in found)
    # mlx-lm's linear layers have no global scale, so they are floats there.
    linear = found[f"{LAYER}.self_attn.o_proj.weight"]
    assert linear.dtype == (mx.uint32 if form == "MXFP4" else mx.float32)
    verdict = judge(tmp_path / "converted", made.reference, 1e-5)
    assert verdict.word == "right", verdict


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3_moe", "NVFP4"),
        ("llama4", "ModelOpt NVFP4 combined"),  # stored turned
        ("deepseek_v3", "ModelOpt FP8 and NVFP4"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp4_becomes_floats_in_any_layout(family: str, form: str, layout: str, tmp_path: Path):
    made = cell(family, form)
    options = Options(layout=WrittenLayout(experts=layout), dtype="float32")
    convert(made.write(tmp_path / "source"), tmp_path / "converted", options)
    verdict = judge(tmp_path / "converted", made.reference, 1e-5)
    assert verdict.word == "right", verdict
