"""Quantising while loading gives what mlx-lm's own ``quantize_model`` gives, in less memory."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch

import vllm_moe_compat
from support import shim
from support.checkpoints import Checkpoint, Fp8, Sizes, build
from support.loading import load, parameters, same_bits
from vllm_moe_compat.checkpoint.operations import Operand, Spec
from vllm_moe_compat.dtypes import stored_name
from vllm_moe_compat.errors import InsufficientMemoryError, UnsupportedCheckpointError
from vllm_moe_compat.execute import arrays, stack
from vllm_moe_compat.execute import run_plan as ex
from vllm_moe_compat.load import memory
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.plan import quantization
from vllm_moe_compat.plan.ops import JoinGateUp, SplitGateUp
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS

QUANTIZE = "VLLM_MOE_COMPAT_QUANTIZE"
SIZES = Sizes(hidden=128, intermediate=64)
FORMS = {
    "per-expert-fp8": ("per-expert", Fp8()),
    "combined-fp8": ("combined", Fp8()),
    "combined-fp8-64x32": ("combined", Fp8((64, 32), torch.float32)),
    "per-expert-bf16": ("per-expert", None),
    "combined-bf16": ("combined", None),
}
EXPERTS = "language_model.model.layers.0.mlp.switch_mlp"


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
    with vllm_moe_compat.applied():
        yield


def unlisted(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.config.get("quantization_config", {}).pop("modules_to_not_convert", None)
    return checkpoint


def by_mlx_lm(path: Path, setting: str) -> tuple[dict[str, mx.array], dict]:
    packing = QUANTIZE_SETTINGS[setting]
    model, config = mlx_lm.utils.load_model(path)
    model, config = mlx_lm.utils.quantize_model(
        model, config, packing.group, packing.bits, mode=packing.mode
    )
    return parameters(model), config


@pytest.mark.parametrize("setting", QUANTIZE_SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_are_those_of_dequantising_first_and_quantising_with_mlx_lm(
    form: str, setting: str, tmp_path: Path, monkeypatch
):
    layout, fp8 = FORMS[form]
    checkpoint = unlisted(build(layout, fp8, sizes=SIZES, mtp=True, vision=True))
    path = checkpoint.write(tmp_path)
    wanted, stock = by_mlx_lm(path, setting)
    # Small steps: experts one by one, rows in bands.
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 20_000)
    monkeypatch.setenv(QUANTIZE, setting)
    model, config = mlx_lm.utils.load_model(path)
    assert same_bits(parameters(model), wanted)
    packing = QUANTIZE_SETTINGS[setting].config
    for name, value in stock["quantization"].items():
        if isinstance(value, dict):
            assert config["quantization"].get(name, packing) == {"mode": "affine"} | value
        else:
            assert config["quantization"][name] == value


def test_a_dense_model_is_quantised_too(tmp_path: Path, monkeypatch):
    path = unlisted(build(fp8=Fp8(), dense=True, sizes=SIZES)).write(tmp_path)
    wanted, _ = by_mlx_lm(path, "8bit")
    monkeypatch.setenv(QUANTIZE, "8bit")
    assert same_bits(parameters(load(path)), wanted)


@pytest.mark.parametrize("setting", QUANTIZE_SETTINGS)
def test_what_is_saved_loads_without_us(setting: str, tmp_path: Path, monkeypatch):
    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path / "source")
    monkeypatch.setenv(QUANTIZE, setting)
    model, config = mlx_lm.utils.load_model(path)
    out = tmp_path / "saved"
    mlx_lm.utils.save_model(out, model)
    mlx_lm.utils.save_config(config, out / "config.json")
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"]
    monkeypatch.delenv(QUANTIZE)
    vllm_moe_compat.revert()
    stock = load(out)
    assert same_bits(parameters(stock), parameters(model))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(stock(tokens), model(tokens))


def test_routers_have_eight_bits_and_listed_modules_are_spared(tmp_path: Path, monkeypatch):
    sizes = Sizes(hidden=128, intermediate=96)
    path = build(fp8=Fp8(), sizes=sizes).write(tmp_path)
    monkeypatch.setenv(QUANTIZE, "4bit")
    model, config = mlx_lm.utils.load_model(path)
    found = parameters(model)
    report = last_report()
    assert report is not None
    assert config["quantization"]["language_model.model.layers.0.mlp.gate"]["bits"] == 8
    # The checkpoint lists its head; a row of 96 is no whole number of groups of 64.
    assert found["language_model.lm_head.weight"].dtype == mx.bfloat16
    assert found["language_model.model.embed_tokens.weight"].dtype == mx.uint32
    assert found[f"{EXPERTS}.down_proj.weight"].dtype == mx.bfloat16
    assert found[f"{EXPERTS}.up_proj.weight"].dtype == mx.uint32
    assert (report.spared, report.odd) == (1, 8)
    assert "8 not, since their rows" in str(report)
    monkeypatch.setenv(QUANTIZE, "8bit")
    assert parameters(load(path))["language_model.lm_head.weight"].dtype == mx.uint32


def exact(checkpoint: Checkpoint) -> np.ndarray:
    return checkpoint.model.model.layers[0].mlp.experts.down_proj.detach().numpy()


@pytest.mark.parametrize(
    ("setting", "limit"), [("8bit", 0.010), ("mxfp8", 0.030), ("6bit", 0.030), ("4bit", 0.12)]
)
def test_relative_rms_error_against_the_exact_product(
    setting: str, limit: float, tmp_path: Path, monkeypatch
):
    checkpoint = build(fp8=Fp8(scale=torch.float32), sizes=Sizes(128, 256, experts=2))
    monkeypatch.setenv(QUANTIZE, setting)
    found = parameters(load(checkpoint.write(tmp_path)))
    packing = QUANTIZE_SETTINGS[setting]
    parts = [found[f"{EXPERTS}.down_proj.{k}"] for k in ("weight", "scales")]
    values = mx.dequantize(
        *parts,
        found.get(f"{EXPERTS}.down_proj.biases"),
        group_size=packing.group,
        bits=packing.bits,
        mode=packing.mode,
    )
    wanted = exact(checkpoint)
    error = np.array(values.astype(mx.float32)) - wanted
    assert np.sqrt((error**2).mean() / (wanted**2).mean()) < limit


@pytest.mark.parametrize(
    ("form", "setting"),
    [("per-expert-fp8", "8bit"), ("per-expert-fp8", "4bit"), ("per-expert-bf16", "8bit")],
)
def test_the_peak_is_a_tenth_over_the_quantised_size(
    form: str, setting: str, tmp_path: Path, monkeypatch
):
    layout, fp8 = FORMS[form]
    sizes = Sizes(hidden=256, intermediate=128, experts=32)
    path = unlisted(build(layout, fp8, sizes=sizes)).write(tmp_path)
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 2**16)
    monkeypatch.setenv(QUANTIZE, setting)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load(path)
    final = sum(array.nbytes for array in parameters(model).values())
    assert mx.get_peak_memory() - before < 1.10 * final
    assert mx.get_active_memory() - before < 1.02 * final
    report = last_report()
    assert report is not None
    assert sum(report.held.values()) == final
    assert report.peak < 1.10 * final


def test_no_source_and_no_fused_tensor_stays_alive(tmp_path: Path, monkeypatch):
    path = unlisted(build("combined", Fp8(), sizes=Sizes(256, 128, 16))).write(tmp_path)
    for setting in ("none", "8bit"):
        monkeypatch.setenv(QUANTIZE, setting)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        model = load(path)
        gc.collect()
        final = sum(array.nbytes for array in parameters(model).values())
        assert mx.get_active_memory() - before < 1.02 * final
        del model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "has `quantization`"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
    ],
)
def test_what_is_quantised_already_is_refused(
    change: dict, words: str, tmp_path: Path, monkeypatch
):
    checkpoint = build("combined", sizes=SIZES)
    checkpoint.config |= change
    path = checkpoint.write(tmp_path)
    monkeypatch.setenv(QUANTIZE, "8bit")
    with pytest.raises(UnsupportedCheckpointError, match=f"quantised already.*{words}.*unset"):
        load(path)


def test_a_checkpoint_in_packed_form_is_refused_whatever_its_config_says(
    tmp_path: Path, monkeypatch
):
    checkpoint = build("combined", sizes=SIZES)
    checkpoint.tensors["lm_head.scales"] = torch.ones(2, 2)
    monkeypatch.setenv(QUANTIZE, "8bit")
    with pytest.raises(UnsupportedCheckpointError, match=r"holds lm_head\.scales"):
        load(checkpoint.write(tmp_path))


def test_a_family_without_a_row_is_refused_by_name(tmp_path: Path, monkeypatch):
    checkpoint = build("combined", sizes=SIZES)
    checkpoint.config["model_type"] = "gear"
    monkeypatch.setenv(QUANTIZE, "8bit")
    with pytest.raises(UnsupportedCheckpointError, match=r"gear cannot be quantised"):
        load(checkpoint.write(tmp_path))


def test_a_sanitize_that_computes_with_the_tensors_is_given_them(tmp_path: Path, monkeypatch):
    from mlx_lm.models import qwen3_5

    original = qwen3_5.TextModel.sanitize

    def doubling(self, weights):
        return {k: v * 2 if "q_proj" in k else v for k, v in original(self, weights).items()}

    monkeypatch.setattr(qwen3_5.TextModel, "sanitize", doubling)
    path = unlisted(build(fp8=Fp8(), sizes=SIZES)).write(tmp_path)
    wanted, _ = by_mlx_lm(path, "8bit")
    monkeypatch.setenv(QUANTIZE, "8bit")
    assert same_bits(parameters(load(path)), wanted)


@pytest.mark.parametrize(
    ("form", "ours"),
    # The shim itself does not know combined FP8 experts.
    [("per-expert-fp8", "outside"), ("per-expert-fp8", "inside"), ("combined-fp8", "outside")],
)
def test_another_librarys_shim_for_the_class_changes_no_bit(
    form: str, ours: str, tmp_path: Path, monkeypatch
):
    layout, fp8 = FORMS[form]
    path = unlisted(build(layout, fp8, sizes=SIZES)).write(tmp_path)
    wanted, _ = by_mlx_lm(path, "8bit")
    monkeypatch.setenv(QUANTIZE, "8bit")
    if ours == "outside":
        vllm_moe_compat.revert()
    remove = shim.install()
    try:
        vllm_moe_compat.apply()
        assert same_bits(parameters(load(path)), wanted)
    finally:
        vllm_moe_compat.revert()
        remove()


def test_the_serving_dtype_is_that_of_the_scales(tmp_path: Path, monkeypatch):
    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path)
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "")
    monkeypatch.setenv(QUANTIZE, "8bit")
    with loading_with(dtype="float32"):
        assert parameters(load(path))[f"{EXPERTS}.up_proj.scales"].dtype == mx.float32
    assert parameters(load(path))[f"{EXPERTS}.up_proj.scales"].dtype == mx.bfloat16


def test_the_line_and_the_status_say_what_is_held(tmp_path: Path, monkeypatch, caplog):
    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path)
    monkeypatch.setenv(QUANTIZE, "8bit")
    with caplog.at_level(logging.INFO, "vllm_moe_compat"):
        load(path)
    (record,) = caplog.records
    for part in ("read ", "stacked 4", "dequantised 73", "quantised 49 modules to 8bit", "peak"):
        assert part in record.message
    for part in ("affine 8-bit g64", "bfloat16", "less than in bfloat16"):
        assert part in record.message
        assert part in str(vllm_moe_compat.status())


def test_too_little_memory_is_refused_and_the_setting_that_fits_is_named(
    tmp_path: Path, monkeypatch, caplog
):
    path = build(fp8=Fp8(), sizes=SIZES).write(tmp_path)
    monkeypatch.setattr("vllm_moe_compat.plan.estimate.WORKING_BYTES", 0)
    weights = sum(a.nbytes for a in parameters(load(path)).values())
    caplog.clear()
    monkeypatch.setattr(memory, "device_memory", lambda: (weights - 1, weights - 1))
    reading = []
    monkeypatch.setattr(ex, "run_plan", lambda *args: reading.append(args))
    with pytest.raises(InsufficientMemoryError, match=r"set VLLM_MOE_COMPAT_QUANTIZE=8bit, which"):
        load(path)
    assert not reading
    monkeypatch.setattr(memory, "device_memory", lambda: (1000, 1000))
    with pytest.raises(InsufficientMemoryError, match="even 4bit takes"):
        load(path)
    monkeypatch.undo()
    with vllm_moe_compat.applied(), caplog.at_level(logging.WARNING, "vllm_moe_compat"):
        monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
        monkeypatch.setattr(memory, "device_memory", lambda: (1 << 40, weights))
        load(path)
    assert "expect swapping" in caplog.text


def test_splitting_undoes_joining():
    gate, up = mx.ones((2, 3, 4)), mx.zeros((2, 3, 4))
    joined = arrays.run(JoinGateUp(), stack.Arrays([gate, up]), "float32")
    halves = arrays.run(SplitGateUp(), joined, "float32")
    assert mx.array_equal(halves.weights[0], gate)
    assert mx.array_equal(halves.weights[1], up)


@pytest.mark.parametrize("setting", QUANTIZE_SETTINGS)
def test_packing_gives_the_specs_and_values_of_mlx(setting: str):
    op = QUANTIZE_SETTINGS[setting]
    weight = mx.random.normal((3, 8, 128))
    packed = arrays.run(op, stack.Arrays([weight]), "float32")
    result = op.result(Operand((Spec("F32", (3, 8, 128)),)), "F32")
    assert [stored_name(w.dtype) for w in packed.weights] == [s.dtype for s in result.weights]
    assert [w.shape for w in packed.weights] == [s.shape for s in result.weights]
    assert packed.parts.keys() == result.parts.keys()
    for role, specs in result.parts.items():
        assert packed.parts[role][0].shape == specs[0].shape
        assert stored_name(packed.parts[role][0].dtype) == specs[0].dtype
    parts = {role: arrays_[0] for role, arrays_ in packed.parts.items()}
    back = mx.dequantize(
        packed.weights[0], **parts, group_size=op.group, bits=op.bits, mode=op.mode
    )
    # A step: of E4M3's four significant bits, else of 2 ** bits levels over the range. MLX moves
    # a group's levels so that zero is one of them, so values at the end err by more than half.
    largest = mx.abs(weight).max().item()
    step = largest / 8 if op.mode == "mxfp8" else 2 * largest / (2**op.bits - 1)
    assert mx.abs(back - weight).max().item() <= step


@pytest.mark.parametrize(
    ("module", "entries", "listed"),
    [
        ("model.layers.1.mlp.gate", ["model.layers.1.mlp.gate"], True),
        ("model.layers.1.mlp.gate_proj", ["model.layers.1.mlp.gate"], False),
        ("model.layers.1.mlp.gate", ["model.layers.1.mlp"], True),
        ("model.language_model.lm_head", ["lm_head"], True),
        ("model.layers.11.mlp.gate", ["model.layers.1"], False),
    ],
)
def test_a_listed_name_means_the_module_its_parents_and_its_end(module, entries, listed):
    assert quantization.is_listed(module, entries) == listed
