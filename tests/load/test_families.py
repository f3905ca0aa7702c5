"""Forms that no oracle computes: what mlx-lm packs itself, and what is broken, per module path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
import torch
from mlx.utils import tree_flatten, tree_map

import vllm_moe_compat
from parity.families import FAMILIES, LEFT_OUT
from parity.forms import FORM_BY_NAME, applies, build
from support.checkpoints import Checkpoint
from support.loading import load, new_model, parameters, same_bits
from vllm_moe_compat.errors import CompatError, LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.load.report import last_report

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

GPT_OSS = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 8,
}

# A family of each module path, in the form that its releases have.
PATHS = {
    "mlp.switch_mlp": "qwen3_moe",
    "block_sparse_moe.switch_mlp": "mixtral",
    "feed_forward.switch_mlp": "jamba",
    "mixer.switch_mlp": "nemotron_h",
    "mlp.experts": "dots1",
    "feed_forward.experts": "llama4",
    "experts.switch_glu": "gemma4",
    "granite": "granitemoe",
}


# Granite's router is quantised in groups of 64, which its 96 columns here are not.
CONVERTED = [f for f in PATHS.values() if applies(FAMILIES[f], FORM_BY_NAME["MLX form"])]
PACKABLE = [family for family in CONVERTED if family != "granitemoe"]


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def save(folder: Path, config: dict[str, Any], weights: dict[str, mx.array]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def test_gpt_oss_as_it_is_released_is_left_to_mlx_lm(tmp_path: Path):
    """MXFP4 experts ``[E, 2I, H/32, 16]`` and bfloat16 biases beside them."""
    config = GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}
    weights: dict[str, mx.array] = {}
    for name, value in tree_flatten(new_model(GPT_OSS).parameters()):
        if ".experts." not in name:
            weights[name] = mx.random.normal(value.shape).astype(mx.bfloat16)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            blocks = mx.random.randint(0, 255, (4, rows, columns // 32, 16))
            weights[f"{experts}.{name}_blocks"] = blocks.astype(mx.uint8)
            scales = mx.random.randint(120, 130, (4, rows, columns // 32))
            weights[f"{experts}.{name}_scales"] = scales.astype(mx.uint8)
            weights[f"{experts}.{name}_bias"] = mx.random.normal((4, rows)).astype(mx.bfloat16)
    path = save(tmp_path, config, weights)
    found = parameters(load(path))
    report = last_report()
    assert report is not None
    assert report.dequantized == 0
    vllm_moe_compat.revert()
    assert same_bits(found, parameters(load(path)))


@pytest.mark.parametrize("family", PACKABLE)
def test_what_mlx_lm_has_quantised_passes_bit_for_bit(family: str, tmp_path: Path):
    cell = build(FAMILIES[family], FORM_BY_NAME["MLX form"])
    plain = cell.write(tmp_path / "plain")
    model, config = mlx_lm.utils.load_model(plain)
    model, config = mlx_lm.utils.quantize_model(model, config, 32, 8)
    (tmp_path / "packed").mkdir()
    mlx_lm.utils.save_model(tmp_path / "packed", model)
    mlx_lm.utils.save_config(config, tmp_path / "packed" / "config.json")
    found = parameters(load(tmp_path / "packed"))
    assert same_bits(found, parameters(model))
    assert any(name.endswith(".scales") for name in found)


Break = Callable[[dict[str, Any], str], None]


def without_an_expert(tensors: dict[str, Any], _: str) -> None:
    gone = [n for n in tensors if ".experts.1." in n]
    assert gone
    for name in gone:
        del tensors[name]


def without_the_last_expert(tensors: dict[str, Any], _: str) -> None:
    last = max(int(n.split(".experts.")[1].split(".")[0]) for n in tensors if ".experts." in n)
    for name in [n for n in tensors if f".experts.{last}." in n]:
        del tensors[name]


def without_a_projection(tensors: dict[str, Any], first: str) -> None:
    del tensors[first]


def of_another_shape(tensors: dict[str, Any], first: str) -> None:
    tensors[first] = tensors[first][:-1]


def without_a_scale(tensors: dict[str, Any], first: str) -> None:
    del tensors[f"{first}_scale_inv"]


def with_another_grid(tensors: dict[str, Any], first: str) -> None:
    tensors[f"{first}_scale_inv"] = tensors[f"{first}_scale_inv"].repeat(3, 1)


def with_a_scale_too_many(tensors: dict[str, Any], first: str) -> None:
    name = first.replace(".experts.0.", ".experts.0.x") + "_scale_inv"
    tensors[name] = tensors[f"{first}_scale_inv"].clone()


def of_another_dtype(tensors: dict[str, Any], first: str) -> None:
    tensors[first] = torch.zeros(tensors[first].shape, dtype=torch.bfloat16)
    del tensors[f"{first}_scale_inv"]


def transposed(tensors: dict[str, Any], first: str) -> None:
    part = first.rpartition(".experts.0.")[2]
    for name in [n for n in tensors if n.endswith(part) and ".experts." in n]:
        tensors[name] = tensors[name].T.contiguous()
        tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"].T.contiguous()


def all_without_a_projection(tensors: dict[str, Any], first: str) -> None:
    part = first.rpartition(".experts.0.")[2]
    for name in [n for n in tensors if ".experts." in n and part in n]:
        del tensors[name]


def with_an_unknown_projection(tensors: dict[str, Any], first: str) -> None:
    part = first.rpartition(".experts.0.")[2]
    for name in [n for n in tensors if ".experts." in n and part in n]:
        tensors[name.replace(part, "sideways.weight")] = tensors.pop(name)


def with_both_layouts(tensors: dict[str, Any], first: str) -> None:
    path = first.partition(".experts.")[0]
    tensors[f"{path}.experts.gate_up_proj"] = torch.zeros(4, 8, 8, dtype=torch.bfloat16)


def under_two_prefixes(tensors: dict[str, Any], first: str) -> None:
    tensors["other." + first[first.index("layers.") :]] = tensors[first].clone()
    tensors["other." + first[first.index("layers.") :] + "_scale_inv"] = tensors[
        f"{first}_scale_inv"
    ].clone()


def at_another_path(tensors: dict[str, Any], _: str) -> None:
    for name in [n for n in tensors if ".experts." in n]:
        tensors[name.replace(".experts.", ".elsewhere.experts.")] = tensors.pop(name)


def as_e5m2(tensors: dict[str, Any], first: str) -> None:
    tensors[first] = tensors[first].float().to(torch.float8_e5m2)


def with_integer_scales(tensors: dict[str, Any], first: str) -> None:
    tensors[f"{first}_scale_inv"] = tensors[f"{first}_scale_inv"].to(torch.int32)


FAULTS: dict[str, tuple[Break, type[CompatError]]] = {
    "a gap in the experts": (without_an_expert, LayoutError),
    "fewer experts than the config says": (without_the_last_expert, LayoutError),
    "a missing projection": (without_a_projection, LayoutError),
    "a projection that no expert has": (all_without_a_projection, LayoutError),
    "a projection of an unknown name": (with_an_unknown_projection, CompatError),
    "an expert of another shape": (of_another_shape, LayoutError),
    "an expert of another dtype": (of_another_dtype, LayoutError),
    "a projection the other way round": (transposed, LayoutError),
    "experts twice": (with_both_layouts, LayoutError),
    "a layer under two prefixes": (under_two_prefixes, LayoutError),
    "experts at another path": (at_another_path, UnsupportedCheckpointError),
    "FP8 without a scale": (without_a_scale, LayoutError),
    "a grid that does not fit": (with_another_grid, LayoutError),
    "a scale without a weight": (with_a_scale_too_many, LayoutError),
    "scales that are integers": (with_integer_scales, UnsupportedCheckpointError),
    "E5M2": (as_e5m2, CompatError),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", [f for f in PATHS.values() if f != "granitemoe"])
def test_a_fault_is_named_before_a_tensor_is_read(
    family: str, fault: str, tmp_path: Path, monkeypatch
):
    damage, error = FAULTS[fault]
    cell = build(FAMILIES[family], FORM_BY_NAME["block FP8"])
    tensors = dict(cell.checkpoint.tensors)
    first = next(n for n in tensors if ".experts.0." in n and n.endswith(".weight"))
    damage(tensors, first)
    Checkpoint(tensors, cell.checkpoint.config).write(tmp_path, shards=1)
    monkeypatch.setattr(mx, "load", None)
    with pytest.raises(error) as caught:
        mlx_lm.utils.load_model(tmp_path)
    message = str(caught.value)
    assert ".experts" in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize("family", CONVERTED)
def test_sanitize_leaves_what_is_in_mlx_form_as_upstream_does(family: str, tmp_path: Path):
    """As mlx-lm's own model tests call it: new weights, no checkpoint."""
    cell = build(FAMILIES[family], FORM_BY_NAME["MLX form"])
    model, _ = mlx_lm.utils.load_model(cell.write(tmp_path))
    weights = dict(tree_flatten(tree_map(lambda p: p, model.parameters())))
    ours = model.sanitize(dict(weights))
    vllm_moe_compat.revert()
    assert same_bits(ours, model.sanitize(dict(weights)))


@pytest.mark.parametrize("level", [".moe.", "."])
@pytest.mark.parametrize("form", ["in-library", "block FP8 combined"])
def test_gemma_4_without_a_level_for_the_experts(level: str, form: str, tmp_path: Path):
    cell = build(FAMILIES["gemma4"], FORM_BY_NAME[form])
    wanted = parameters(load(cell.write(tmp_path / "with")))
    tensors = {n.replace(".experts.", level): t for n, t in cell.checkpoint.tensors.items()}
    assert tensors.keys() != cell.checkpoint.tensors.keys()
    Checkpoint(tensors, cell.checkpoint.config).write(tmp_path / "without", shards=1)
    assert same_bits(parameters(load(tmp_path / "without")), wanted)


def test_a_form_that_no_family_publishes_is_named(tmp_path: Path):
    cell = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["block FP8"])
    tensors = dict(cell.checkpoint.tensors)
    first = next(n for n in tensors if ".experts.0." in n and n.endswith(".weight"))
    tensors[first.replace(".weight", ".qweight")] = tensors.pop(first)
    Checkpoint(tensors, cell.checkpoint.config).write(tmp_path, shards=1)
    with pytest.raises(CompatError, match=r"qweight is FP8"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        pair
        for pair in (
            ("deepseek_v3", "block FP8 128"),
            ("minimax_m2", "block FP8 128"),
            ("mimo_v2_flash", "block FP8 128"),
            ("mistral4", "per-tensor FP8"),
        )
        if pair[0] not in LEFT_OUT
    ],
)
def test_fp8_that_upstream_multiplies_out_stays_upstreams_in_bfloat16(
    family: str, form: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
    folder = build(FAMILIES[family], FORM_BY_NAME[form]).write(tmp_path)
    found = parameters(load(folder))
    report = last_report()
    assert report is not None
    assert (report.dequantized, report.layers) == (0, 0)
    vllm_moe_compat.revert()
    assert same_bits(found, parameters(load(folder)))


def test_where_float32_serves_the_plan_multiplies_out(tmp_path: Path):
    load(build(FAMILIES["deepseek_v3"], FORM_BY_NAME["block FP8 128"]).write(tmp_path))
    report = last_report()
    assert report is not None
    assert report.dequantized > 0
    assert report.dtype == "float32"


# In kind what mlx-lm's own model tests do: call sanitize on something that is no checkpoint.


NO_DEFAULTS: dict[str, Any] = {
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@pytest.mark.needs("mlx_lm/models/qwen3_moe.py", "moe_layers")
def test_what_upstream_stacks_is_not_judged_when_only_a_dict_is_given():
    """Tiny experts of the wrong size, in every other layer."""
    from mlx_lm.models import qwen3_moe

    settings = FAMILIES["qwen3_moe"].settings()
    config = {"model_type": "qwen3_moe", "num_experts": 4}
    known = {**settings, **config, **NO_DEFAULTS, "num_hidden_layers": 4}
    model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(known))
    weights = {
        f"model.layers.{layer}.mlp.experts.{e}.{name}.weight": mx.zeros((1, 1))
        for layer in (1, 3)
        for e in range(4)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    found = model.sanitize(weights)
    assert set(found) == {
        f"model.layers.{layer}.mlp.switch_mlp.{name}.weight"
        for layer in (1, 3)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.needs("mlx_lm/models/qwen3_vl.py", '.get("language_model")')
def test_names_without_tensors_are_upstreams_to_rename():
    from mlx_lm.models import qwen3_vl

    settings = FAMILIES["qwen3"].settings() | {"model_type": "qwen3", **NO_DEFAULTS}
    model = qwen3_vl.Model(qwen3_vl.ModelArgs(model_type="qwen3_vl", text_config=settings))
    found = model.sanitize({"model.language_model.norm.weight": None})
    assert set(found) == {"language_model.model.norm.weight"}
