"""Every form of Qwen3.5 gives the logits that transformers gives."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
import torch

import vllm_moe_compat
from support.checkpoints import Checkpoint, Fp8, Sizes, build
from support.loading import distance, load, new_model, parameters, read, same_bits
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.planner import Plan

LIMIT = 1e-5
RAGGED = Sizes(hidden=192, intermediate=200)
FORMS = {
    "combined-bf16": ("combined", None),
    "per-expert-bf16": ("per-expert", None),
    "combined-fp8": ("combined", Fp8()),
    "per-expert-fp8": ("per-expert", Fp8()),
}
BLOCKS = {
    "blocks-128x128": Fp8(),
    "blocks-64x32-f32": Fp8((64, 32), torch.float32),
    "blocks-1x128-f16": Fp8((1, 128), torch.float16),
}


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    # A test that ran before may have lent the logger vLLM's handlers.
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    with vllm_moe_compat.applied():
        yield


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "with-mtp-and-vision"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_transformers(form: str, extras: bool, tmp_path: Path):
    layout, fp8 = FORMS[form]
    checkpoint = build(layout, fp8, mtp=extras, vision=extras)
    model = load(checkpoint.write(tmp_path))
    assert distance(model, checkpoint) < LIMIT


@pytest.mark.parametrize("extra", ["mtp", "vision"])
def test_one_kind_of_extra_alone_is_ignored(extra: str, tmp_path: Path):
    checkpoint = build(fp8=Fp8(), mtp=extra == "mtp", vision=extra == "vision")
    assert distance(load(checkpoint.write(tmp_path)), checkpoint) < LIMIT


@pytest.mark.parametrize("form", ["per-expert", "combined"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_any_block_shape_and_scale_dtype_on_ragged_dimensions(
    blocks: str, form: str, tmp_path: Path
):
    checkpoint = build(form, BLOCKS[blocks], sizes=RAGGED)
    assert distance(load(checkpoint.write(tmp_path)), checkpoint) < LIMIT


@pytest.mark.parametrize("blocks", BLOCKS)
def test_dense_fp8(blocks: str, tmp_path: Path):
    checkpoint = build(fp8=BLOCKS[blocks], dense=True, mtp=True, vision=True, sizes=RAGGED)
    assert distance(load(checkpoint.write(tmp_path)), checkpoint) < LIMIT


@pytest.mark.parametrize("prefix", ["model.", "language_model.model."])
def test_other_prefixes_are_kept_and_never_applied_twice(prefix: str, tmp_path: Path):
    checkpoint = build(fp8=Fp8(), prefix=prefix, vision=True)
    assert distance(load(checkpoint.write(tmp_path)), checkpoint) < LIMIT


def test_a_vision_tower_inside_the_language_model_is_dropped(tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    checkpoint.tensors["model.language_model.visual.blocks.0.norm1.weight"] = torch.randn(8)
    assert distance(load(checkpoint.write(tmp_path)), checkpoint) < LIMIT


def test_static_activation_scales_are_dropped(tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    for name in [n for n in checkpoint.tensors if n.endswith(".weight_scale_inv")]:
        static = name.replace(".weight_scale_inv", ".activation_scale")
        checkpoint.tensors[static] = torch.tensor(1.0)
    assert distance(load(checkpoint.write(tmp_path)), checkpoint) < LIMIT


def test_layers_may_differ_in_form(tmp_path: Path):
    checkpoint = build("per-expert", Fp8())
    combined = build("combined", None)
    per_expert = {n for n in checkpoint.tensors if ".layers.1.mlp.experts." in n}
    for name in per_expert:
        del checkpoint.tensors[name]
    for name, value in combined.tensors.items():
        if ".layers.1.mlp.experts." in name:
            checkpoint.tensors[name] = value
            path = name.replace("model.language_model.", "model.")
            checkpoint.model.get_parameter(path).data.copy_(value.float())
    assert distance(load(checkpoint.write(tmp_path)), checkpoint) < LIMIT


def mlx_form(tmp_path: Path, bits: int | None) -> Path:
    """Have mlx-lm itself, untouched, write a checkpoint in its own form."""
    path = build("combined", sizes=Sizes(hidden=64, intermediate=64)).write(tmp_path / "source")
    vllm_moe_compat.revert()
    model, config = mlx_lm.utils.load_model(path)
    if bits:
        model, config = mlx_lm.utils.quantize_model(model, config, 64, bits)
    out = tmp_path / "mlx"
    mlx_lm.utils.save_model(out, model)
    mlx_lm.utils.save_config(config, out / "config.json")
    vllm_moe_compat.apply()
    return out


@pytest.mark.parametrize("bits", [None, 4], ids=["bf16", "4-bit"])
def test_mlx_form_passes_bit_for_bit(bits: int | None, tmp_path: Path, caplog):
    path = mlx_form(tmp_path, bits)
    with caplog.at_level(logging.INFO, "vllm_moe_compat"):
        ours = parameters(load(path))
    assert "left as it is" in caplog.text
    vllm_moe_compat.revert()
    stock = parameters(load(path))
    assert same_bits(ours, stock)
    assert any("switch_mlp" in name for name in ours)
    assert any(name.endswith(".biases") for name in ours) == bool(bits)


@pytest.mark.parametrize("form", ["combined", "per-expert"])
def test_experts_come_out_as_their_values_dequantised_and_rounded_once(form: str, tmp_path: Path):
    checkpoint = build(form, Fp8(scale=torch.float32), sizes=RAGGED)
    checkpoint.write(tmp_path)
    with loading_with(dtype="bfloat16"):
        found = parameters(load(tmp_path))
    for layer in range(4):
        wanted = checkpoint.model.model.layers[layer].mlp.experts
        gate, up = wanted.gate_up_proj.data.chunk(2, dim=1)
        for name, value in {"gate": gate, "up": up, "down": wanted.down_proj.data}.items():
            array = found[f"language_model.model.layers.{layer}.mlp.switch_mlp.{name}_proj.weight"]
            assert array.dtype == mx.bfloat16
            bits = torch.tensor(memoryview(mx.contiguous(array).view(mx.int16)).tolist())
            assert torch.equal(bits, value.bfloat16().view(torch.int16))


@pytest.mark.parametrize(
    ("setting", "serving", "wanted"),
    [
        ("", None, mx.float32),
        ("", "bfloat16", mx.bfloat16),
        ("", "float16", mx.float16),
        ("float32", "bfloat16", mx.float32),
        ("bfloat16", None, mx.bfloat16),
    ],
)
def test_target_dtype_follows_setting_then_server_then_device(
    setting: str, serving: str | None, wanted: mx.Dtype, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", setting)
    path = build(fp8=Fp8()).write(tmp_path)
    if serving:
        with loading_with(dtype=serving):
            found = parameters(load(path))
    else:
        found = parameters(load(path))
    assert found["language_model.model.layers.0.mlp.switch_mlp.up_proj.weight"].dtype == wanted


def test_one_line_says_what_was_done(tmp_path: Path, caplog):
    path = build(fp8=Fp8(), mtp=True).write(tmp_path)
    with caplog.at_level(logging.INFO, "vllm_moe_compat"):
        load(path)
    # Beside what the row puts into an older module.
    (record,) = (record for record in caplog.records if ": put " not in record.message)
    assert record.levelno == logging.INFO
    for part in (str(path), "qwen3_5_moe", "per-expert", "4 experts x 4 layers", "73 tensors"):
        assert part in record.message
    report = last_report()
    assert report is not None
    assert (report.experts, report.layers, report.dequantized) == (4, 4, 73)
    assert report.dtype == "float32"


def test_the_config_that_comes_back_is_quantised_no_more(tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    checkpoint.config["text_config"]["quantization_config"] = {
        "quant_method": "mxfp4",
        "weight_block_size": [128, 128],
    }
    checkpoint.write(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text('{"quant_method": "modelopt"}')
    model, config = mlx_lm.utils.load_model(tmp_path)
    assert "quantization" not in config
    assert config["quantization_config"]["quant_method"] == "dequantized"
    assert config["text_config"]["quantization_config"]["quant_method"] == "dequantized"
    assert distance(model, checkpoint) < LIMIT


def test_a_ue8m0_config_with_float_scales_is_not_taken_for_mxfp8(tmp_path: Path):
    checkpoint = build(fp8=Fp8((32, 32), torch.float32))
    checkpoint.config["quantization_config"]["scale_fmt"] = "ue8m0"
    assert distance(load(checkpoint.write(tmp_path)), checkpoint) < LIMIT


def test_a_config_of_bf16_weights_is_left_alone(tmp_path: Path):
    checkpoint = build("per-expert")
    checkpoint.write(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text())
    read = mlx_lm.utils.load_config(tmp_path)
    # Settings that the file leaves out are added.
    assert read == file | {"text_config": read["text_config"] | file["text_config"]}


def test_sanitize_called_directly_gives_the_same(tmp_path: Path):
    checkpoint = build(fp8=Fp8(), mtp=True, vision=True)
    checkpoint.write(tmp_path)
    loaded = parameters(load(tmp_path))
    model = new_model(checkpoint.config)
    model.load_weights(list(model.sanitize(read(tmp_path)).items()), strict=True)
    assert same_bits(parameters(model), loaded)


def test_sanitize_twice_changes_nothing_more(tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    checkpoint.write(tmp_path)
    model = new_model(checkpoint.config)
    once = model.sanitize(read(tmp_path))
    assert same_bits(model.sanitize(dict(once)), once)


def test_a_context_of_another_checkpoint_is_not_used(tmp_path: Path):
    other = build(fp8=Fp8((64, 32)), sizes=Sizes(hidden=64, intermediate=64))
    other.write(tmp_path / "other")
    checkpoint = build(fp8=Fp8())
    checkpoint.write(tmp_path / "mine")
    mlx_lm.utils.load_config(tmp_path / "other")
    model = new_model(checkpoint.config)
    model.load_weights(list(model.sanitize(read(tmp_path / "mine")).items()), strict=True)
    assert distance(model, checkpoint) < LIMIT


def test_sources_leave_the_callers_dict(tmp_path: Path):
    checkpoint = build(fp8=Fp8())
    checkpoint.write(tmp_path)
    mlx_lm.utils.load_config(tmp_path)
    weights = read(tmp_path)
    new_model(checkpoint.config).sanitize(weights)
    assert not any(".experts." in name or name.endswith("_scale_inv") for name in weights)


def test_a_folder_without_weights_is_not_looked_at(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5_moe", "num_experts": "many"}')
    assert mlx_lm.utils.load_config(tmp_path)["num_experts"] == "many"


def test_a_replaced_checkpoint_is_planned_anew(tmp_path: Path):
    build(fp8=Fp8()).write(tmp_path)
    load(tmp_path)
    changed = Checkpoint(**vars(build(fp8=Fp8((64, 32)), seed=5)))
    changed.write(tmp_path)
    assert distance(load(tmp_path), changed) < LIMIT


def test_no_plan_outlives_its_load(tmp_path: Path):
    load(build(fp8=Fp8(), sizes=Sizes(layers=4)).write(tmp_path))
    gc.collect()
    # ``type``, since ``isinstance`` asks torch's deprecated objects for their class.
    assert not [held for held in gc.get_objects() if type(held) in (Plan, PlannedLoad, Build)]


@pytest.mark.needs("mlx_lm/utils.py", "_tokenizer_defaults")
def test_mlx_lm_reads_the_config_for_loads_and_for_tokenizers_where_we_look():
    """The hook tells the two apart by the nearer of these functions on the stack."""
    for name in ("load_model", "_tokenizer_defaults"):
        code = getattr(mlx_lm.utils, name).__code__
        assert "load_config" in code.co_names, name
