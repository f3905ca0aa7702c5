"""Integers and FP8 bytes never reach a floating-point parameter; packed formats do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
import torch
from mlx_lm.models import phi3

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from parity.verdict import compare
from support.checkpoints import Checkpoint
from support.loading import load, new_model, parameters, same_bits
from vllm_moe_compat.errors import CompatError, UnsupportedCheckpointError
from vllm_moe_compat.load import guard

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

TOKENS = mx.array([[1, 2, 3, 4, 5]])
DENSE = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _hooks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, vllm_moe_compat.applied():
        # A test that ran before may have lent the logger vLLM's handlers.
        patch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
        yield


def family(name: str, form: str = "release") -> Checkpoint:
    """A checkpoint whose tensors may be replaced."""
    found = build(FAMILIES[name], FORM_BY_NAME[form]).checkpoint
    return Checkpoint(dict(found.tensors), deepcopy(found.config))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", DENSE),
        ("phi3", "model.layers.1.mlp.down_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_an_integer_weight_is_refused_before_a_tensor_is_read(
    name: str, tensor: str, dtype: torch.dtype, tmp_path: Path
):
    checkpoint = family(name)
    checkpoint.tensors[tensor] = (checkpoint.tensors[tensor] * 64).to(dtype)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        mlx_lm.utils.load_config(checkpoint.write(tmp_path))
    stored = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"}[dtype]
    assert f"{tensor} is {stored}, as which no form of weights is known" in str(caught.value)


def test_many_integer_weights_are_one_sentence(tmp_path: Path):
    checkpoint = family("llama")
    for name in list(checkpoint.tensors):
        if name.endswith("_proj.weight"):
            checkpoint.tensors[name] = checkpoint.tensors[name].to(torch.int8)
    with pytest.raises(UnsupportedCheckpointError, match=r"layers\.0…1") as caught:
        load(checkpoint.write(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["block FP8", "per-tensor FP8", "per-channel FP8"])
def test_fp8_without_its_scale_is_refused_before_a_tensor_is_read(form: str, tmp_path: Path):
    checkpoint = family("llama", form)
    for name in list(checkpoint.tensors):
        if name.startswith(DENSE) and name != DENSE:
            del checkpoint.tensors[name]
    with pytest.raises(CompatError, match=DENSE):
        mlx_lm.utils.load_config(checkpoint.write(tmp_path))


def test_what_comes_without_files_is_looked_at_too():
    checkpoint = family("llama")
    weights = {name: mx.array(value.numpy()) for name, value in checkpoint.tensors.items()}
    weights[DENSE] = weights[DENSE].astype(mx.int8)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        new_model(checkpoint.config).sanitize(weights)
    assert f"{DENSE} would be loaded as int8" in str(caught.value)
    assert "expected a floating-point tensor for mlx_lm.models.llama" in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3", "phi3"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_what_mlx_lm_has_quantised_is_left_alone(name: str, mode: str, tmp_path: Path):
    source = family(name).write(tmp_path / "source")
    model, config = mlx_lm.utils.load_model(source)
    bits, group = {"mxfp8": (8, 32), "nvfp4": (4, 16)}.get(mode, (4, 32))
    model, config = mlx_lm.utils.quantize_model(model, config, group, bits, mode)
    target = tmp_path / "target"
    target.mkdir()
    mlx_lm.utils.save_model(target, model)
    mlx_lm.utils.save_config(config, target / "config.json")
    ours = load(target)
    vllm_moe_compat.revert()
    stock = load(target)
    assert same_bits(parameters(ours), parameters(stock))
    assert mx.array_equal(ours(TOKENS), stock(TOKENS))
    assert any(array.dtype == mx.uint32 for array in parameters(ours).values())


def same_as_stock(path: Path) -> Any:
    """Load with the plugin and without: the same bits, and that model."""
    ours = load(path)
    vllm_moe_compat.revert()
    assert same_bits(parameters(ours), parameters(load(path)))
    return ours


def test_bitnet_is_left_alone(tmp_path: Path):
    checkpoint = family("llama")
    for name in list(checkpoint.tensors):
        if name.endswith("_proj.weight"):
            rows, columns = checkpoint.tensors[name].shape
            checkpoint.tensors[name] = torch.full((rows // 4, columns), 27, dtype=torch.uint8)
            scale = f"{name.removesuffix('weight')}weight_scale"
            checkpoint.tensors[scale] = torch.ones(1)
    checkpoint.config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "modules_to_not_convert": ["lm_head"],
    }
    model = same_as_stock(checkpoint.write(tmp_path))
    assert parameters(model)[DENSE].dtype == mx.uint8


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({}, True),
        ({"quantization_config": {"quant_method": "fp8"}}, True),
        ({"quantization_config": {"quant_method": "modelopt"}}, True),
        ({"quantization_config": "fp8"}, True),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, True),
        ({"quantization": {"bits": 4, "group_size": 64}}, False),
        ({"quantization_config": {"quant_method": "gptq"}}, True),
        ({"text_config": {"quantization_config": {"quant_method": "bitnet"}}}, False),
    ],
)
def test_whose_formats_are_whose(config: dict[str, Any], refused: bool):
    model = new_model(family("llama").config)
    weights = {DENSE: mx.zeros((64, 64), mx.uint8)}
    if not refused:
        guard.check(model, weights, config, "")
        return
    with pytest.raises(UnsupportedCheckpointError, match="would be loaded as uint8"):
        guard.check(model, weights, config, "")


def test_integers_that_are_no_weights_of_the_model_are_not_its_business():
    """Strict loading names what is too many."""
    model = new_model(family("llama").config)
    guard.check(model, {"somewhere.else": mx.zeros((2,), mx.int32)}, {}, "")
    packed = {"some.weight": mx.zeros((64, 8), mx.uint32), "some.scales": mx.ones(1)}
    guard.check(model, packed, {}, "")


# Classes that no row covers. The file's tensors are no gemma's: nobody gets to read them.
GEMMA = {
    "model_type": "gemma",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 8,
    "num_key_value_heads": 1,
}
BYTES = torch.zeros(64, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("scales", [{f"{DENSE}_scale_inv": torch.ones(1, 1)}, {}])
def test_fp8_of_a_class_without_a_row_is_refused(
    scales: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = Checkpoint({DENSE: BYTES, **scales}, GEMMA).write(tmp_path, shards=1)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        mlx_lm.utils.load_config(path)
    for words in (
        f"model-00001-of-00001.safetensors: {DENSE} is FP8",
        "mlx_lm.models.gemma reads as integers",
        "it is not in the map of supported modules",
        "load a bf16 release",
    ):
        assert words in str(caught.value)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 FP8 weights are left to mlx-lm as they are" in caplog.text


def test_experts_of_a_class_without_a_row_are_named_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    experts = {
        f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": torch.zeros(8, 8)
        for e in (0, 1)
        for p in ("gate", "up", "down")
    }
    mlx_lm.utils.load_config(Checkpoint(experts, GEMMA).write(tmp_path))
    assert "6 per-expert weights are left to mlx-lm as they are" in caplog.text


def test_fp8_of_a_checkpoint_with_its_own_code_is_its_codes_business(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = GEMMA | {"model_file": "own.py"}
    path = Checkpoint({DENSE: BYTES}, config).write(tmp_path, shards=1)
    assert mlx_lm.utils.load_config(path) == config
    assert "it is the checkpoint's own code" in caplog.text


def test_a_class_without_sanitize_is_given_one_and_loses_it_again(tmp_path: Path):
    vllm_moe_compat.revert()
    assert not hasattr(phi3.Model, "sanitize")
    cell = build(FAMILIES["phi3"], FORM_BY_NAME["block FP8"])
    path = cell.write(tmp_path)
    with pytest.raises(ValueError, match="weight_scale_inv"):
        load(path)
    with vllm_moe_compat.applied():
        assert callable(phi3.Model.sanitize)
        model = load(path)
    assert not hasattr(phi3.Model, "sanitize")
    assert compare(model, cell.reference, 1e-5).word == "right"


def test_integers_are_named_when_weights_are_quantised_too(tmp_path: Path, monkeypatch):
    """A norm is packed by no setting: it would go into its parameter as it is."""
    checkpoint = family("llama")
    name = "model.layers.0.input_layernorm.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].to(torch.int8)
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "8bit")
    with pytest.raises(UnsupportedCheckpointError, match=r"input_layernorm.*int8"):
        load(checkpoint.write(tmp_path))


@pytest.mark.parametrize(
    ("words", "scales", "biases"),
    [
        ((64, 5), (64, 2), (64, 2)),
        ((64, 8), (64, 4), (64, 4)),
        ((64, 8), (64, 2), (64, 1)),
        ((64, 8), (64, 2), None),
    ],
    ids=["no whole bits", "group 16", "other biases", "no biases"],
)
def test_words_that_no_format_explains_are_refused(
    words: tuple[int, ...], scales: tuple[int, ...], biases: tuple[int, ...] | None
):
    """As an upstream sanitize would leave them that takes one packed form for another."""
    model = new_model(family("llama").config)
    path = DENSE.removesuffix(".weight")
    weights = {DENSE: mx.zeros(words, mx.uint32), f"{path}.scales": mx.zeros(scales)}
    if biases is not None:
        weights[f"{path}.biases"] = mx.zeros(biases)
    with pytest.raises(UnsupportedCheckpointError, match="no format of MLX explains"):
        guard.check(model, weights, {}, "here")
    sound = {
        DENSE: mx.zeros((64, 8), mx.uint32),
        f"{path}.scales": mx.zeros((64, 2)),
        f"{path}.biases": mx.zeros((64, 2)),
    }
    guard.check(model, sound, {}, "here")
