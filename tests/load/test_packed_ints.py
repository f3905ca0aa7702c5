"""Loads of packed integers: mixed forms, saved and converted results, memory, refusals."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, Cell, build
from parity.fp8 import quantize
from parity.verdict import compare
from support.agreement import check_agreement, planned_loads
from support.loading import load, parameters, same_bits
from support.packed import awq_form, gptq_form, pack_form
from vllm_moe_compat.checkpoint import contents
from vllm_moe_compat.commands.convert.conversion import Options, convert
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.errors import CompatError, UnsupportedCheckpointError
from vllm_moe_compat.execute import stack
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.rewrite.written_layout import WrittenLayout

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
QUANTIZE = "VLLM_MOE_COMPAT_QUANTIZE"
ATTENTION = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"
SWITCH = "model.layers.1.mlp.switch_mlp.up_proj"


@pytest.fixture(autouse=True)
def _hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def cell(form: str, family: str = "qwen3_moe") -> Cell:
    return build(FAMILIES[family], FORM_BY_NAME[form])


HELD = ["int4", "int4 combined", "int8 g64", "int8 W8A8", "GPTQ", "GPTQ 3-bit", "AWQ"]


@pytest.mark.parametrize("form", [*HELD, "int4 ragged", "GPTQ act-order"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_what_is_saved_loads_without_us(family: str, form: str, tmp_path: Path):
    path = cell(form, family).write(tmp_path / "source")
    model, config = mlx_lm.utils.load_model(path)
    out = tmp_path / "saved"
    mlx_lm.utils.save_model(out, model)
    mlx_lm.utils.save_config(config, out / "config.json")
    vllm_moe_compat.revert()
    stock = load(out)
    assert same_bits(parameters(stock), parameters(model))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(stock(tokens), model(tokens))


@pytest.mark.parametrize("form", [*HELD, "int4 ragged", "GPTQ act-order"])
def test_convert_writes_what_a_load_holds(form: str, tmp_path: Path):
    path = cell(form).write(tmp_path / "source")
    wanted = parameters(load(path))
    report = convert(path, tmp_path / "out", Options(dtype="float32", verify=True))
    assert report.written > 0
    vllm_moe_compat.revert()
    found = parameters(load(tmp_path / "out"))
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.shape == wanted[name].shape
        assert mx.array_equal(array, wanted[name].astype(array.dtype)).item(), name


@pytest.mark.parametrize("form", ["int4", "int4 combined", "GPTQ combined", "AWQ"])
@pytest.mark.parametrize("experts", ["per-expert", "combined"])
def test_convert_writes_published_layouts_of_floats(experts: str, form: str, tmp_path: Path):
    found = cell(form)
    path = found.write(tmp_path / "source")
    convert(path, tmp_path / "out", Options(WrittenLayout(experts), dtype="float32"))
    assert compare(load(tmp_path / "out"), found.reference, 2e-5).word == "right"


@pytest.mark.parametrize("form", ["int4", "int8 W8A8", "GPTQ", "AWQ", "GPTQ act-order"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_may_be_stacked_already(family: str, form: str, tmp_path: Path):
    found = cell(form, family)
    tensors = found.checkpoint.tensors
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name in [name for name in tensors if ".experts." in name]:
        path, _, rest = name.partition(".experts.")
        expert, _, rest = rest.partition(".")
        stacks.setdefault(f"{path}.switch_mlp.{rest}", {})[int(expert)] = tensors.pop(name)
    for name, each in stacks.items():
        tensors[name] = torch.stack([each[e] for e in sorted(each)])
    path = found.write(tmp_path)
    with planned_loads() as plans:
        model = load(path)
    check_agreement(path, plans, None)
    assert compare(model, found.reference, 2e-5).word == "right"
    dtype = mx.float32 if "act-order" in form else mx.uint32
    assert parameters(model)[f"{SWITCH}.weight"].dtype == dtype


def mixed() -> Cell:
    """Attention in FP8 and bf16, experts in int4."""
    found = cell("int4")
    generator = torch.Generator().manual_seed(3)
    plain = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"])
    tensors = found.checkpoint.tensors
    for layer, kind in ((0, "fp8"), (1, "bf16")):
        for part in "qkvo":
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            for end in ("_packed", "_scale", "_shape"):
                del tensors[name + end]
            value = plain.checkpoint.tensors[name]
            tensors[name] = value
            if kind == "fp8":
                block = (1, value.shape[-1])
                tensors[name], tensors[f"{name}_scale"] = quantize(
                    value, block, 179 / 128, generator
                )
    return found


def test_forms_are_mixed_by_module(tmp_path: Path):
    path = mixed().write(tmp_path)
    with planned_loads() as plans:
        model, config = mlx_lm.utils.load_model(path)
    check_agreement(path, plans, None)
    plain = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"]).checkpoint.tensors
    for layer in (0, 1):
        for part in "qkvo":
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            assert np.array_equal(np.array(parameters(model)[name]), plain[name].numpy())
    assert parameters(model)[f"{SWITCH}.weight"].dtype == mx.uint32
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    report = last_report()
    assert report is not None
    assert (report.held_packed, report.dequantized) == (24, 4)
    assert "kept 24 weights packed as affine 4-bit g32, dequantised 4 tensors" in str(report)


def test_the_config_names_formats_that_differ(tmp_path: Path):
    """Widths and groups per module: the regular expressions of ``config_groups``."""
    found = cell("int4")
    generator = np.random.default_rng(1)
    wide = pack_form(8, 64)
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        rows, _ = found.checkpoint.tensors[f"{name}_shape"].tolist()
        found.checkpoint.tensors |= wide.store(name, wide.draw(generator, rows, 64))
    groups = found.checkpoint.config["quantization_config"]["config_groups"]
    weights = wide.config["config_groups"]["group_0"]["weights"]
    groups["group_1"] = {"targets": ["re:.*o_proj$"], "weights": weights}
    model, config = mlx_lm.utils.load_model(found.write(tmp_path))
    o_proj = model.layers[0].self_attn.o_proj
    assert (o_proj.bits, o_proj.group_size) == (8, 64)
    eight = {"group_size": 64, "bits": 8, "mode": "affine"}
    four = {"group_size": 32, "bits": 4, "mode": "affine"}
    named = {f"model.layers.{n}.self_attn.o_proj": eight for n in (0, 1)}
    assert config["quantization"] == four | named


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_of_zeros_that_no_layer_has_are_dropped(value: float, tmp_path: Path):
    found = cell("GPTQ", "llama")
    for name in [n for n in found.checkpoint.tensors if n.endswith(".qweight")]:
        bias = torch.full(found.checkpoint.tensors[name].shape[1:], value)
        found.checkpoint.tensors[name.replace("qweight", "bias")] = bias
    path = found.write(tmp_path / "source")
    if value:
        with pytest.raises(ValueError, match="Received 14 parameters not in model"):
            load(path)
        return
    assert compare(load(path), found.reference, 1e-5).word == "right"
    report = convert(path, tmp_path / "out", Options(dtype="float32"))
    assert "affine 4-bit g32" in report.form


def test_auto_round_has_other_settings_for_single_layers(tmp_path: Path):
    found = cell("AutoRound")
    generator = np.random.default_rng(1)
    other = gptq_form(4, 64)
    name = "model.layers.0.self_attn.o_proj.weight"
    ints = other.draw(generator, 64, 64)
    tensors = found.checkpoint.tensors
    tensors |= other.store(name, ints)
    settings = {"bits": 4, "group_size": 64, "sym": False}
    config = found.checkpoint.config["quantization_config"]
    config["extra_config"] = {
        name.removesuffix(".weight"): settings,
        "model.layers.1.self_attn.o_proj": {"bits": 16},
    }
    base = "model.layers.1.self_attn.o_proj."
    for part in ("qweight", "qzeros", "scales"):
        del tensors[base + part]
    tensors[f"{base}weight"] = torch.ones(64, 64)
    model = load(found.write(tmp_path))
    o_proj = model.layers[0].self_attn.o_proj
    values = mx.dequantize(
        o_proj.weight, o_proj.scales, o_proj.biases, o_proj.group_size, o_proj.bits
    )
    assert np.array_equal(np.array(values), ints.values)
    assert parameters(model)[f"{base}weight"].dtype == mx.float32


def test_the_peak_is_the_final_size_and_a_quarter_of_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 2**16)
    for form in (pack_form(4, 32), gptq_form(4, 32), gptq_form(3, 64), awq_form(32)):
        path = large(form).write(tmp_path / form.name)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model = load(path)
        held = parameters(model)
        final = sum(array.nbytes for array in held.values())
        layer = sum(array.nbytes for name, array in held.items() if ".layers.0." in name)
        assert mx.get_peak_memory() - before < final + layer / 4, form.name
        assert mx.get_active_memory() - before < 1.02 * final
        found = inspect(str(path))
        assert found.memory is not None
        assert found.memory.needs[0].weights == final
        assert [need.setting for need in found.memory.needs] == ["none"]
        del model, held


def large(form: Any) -> Cell:
    """Four MoE layers of which the experts are nearly everything."""
    from parity.family import EXPERTS, causal
    from parity.reference import new_config
    from support.checkpoints import Checkpoint

    sizes = EXPERTS | {"num_experts": 16, "moe_intermediate_size": 128, "num_hidden_layers": 4}
    family = causal("large", "qwen3_moe", "Qwen3Moe", **sizes, hidden_size=256, head_dim=32)
    config = new_config(family).to_dict()
    config["quantization_config"] = form.config
    generator = np.random.default_rng(0)
    ones, put = torch.ones, form.store
    tensors = {"model.embed_tokens.weight": ones(96, 256), "model.norm.weight": ones(256)}
    tensors["lm_head.weight"] = ones(96, 256)
    for n in range(4):
        layer = f"model.layers.{n}"
        for name, rows, columns in (
            *(("self_attn." + p, o, i) for p, o, i in HEADS),
            ("mlp.gate", 0, 0),
        ):
            if rows:
                ints = form.draw(generator, rows, columns)
                tensors |= put(f"{layer}.{name}.weight", ints)
        tensors[f"{layer}.mlp.gate.weight"] = ones(16, 256)
        for norm, size in NORMS:
            tensors[f"{layer}.{norm}.weight"] = ones(size)
        for e in range(16):
            for part, rows, columns in (("gate", 128, 256), ("up", 128, 256), ("down", 256, 128)):
                ints = form.draw(generator, rows, columns)
                tensors |= put(f"{layer}.mlp.experts.{e}.{part}_proj.weight", ints)
    return Cell(Checkpoint(tensors, config), None)  # type: ignore[arg-type]


HEADS = (("q_proj", 128, 256), ("k_proj", 64, 256), ("v_proj", 64, 256), ("o_proj", 256, 128))
NORMS = (
    ("input_layernorm", 256),
    ("post_attention_layernorm", 256),
    ("self_attn.q_norm", 32),
    ("self_attn.k_norm", 32),
)


def test_weights_that_stay_packed_are_not_quantised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = cell("int4").write(tmp_path)
    monkeypatch.setenv(QUANTIZE, "8bit")
    with pytest.raises(UnsupportedCheckpointError, match="stay packed as they are stored"):
        load(path)
    found = inspect(str(path))
    assert [f.id for f in found.findings if f.severity == "error"] == ["quantized-already"]


def test_weights_that_are_dequantised_anyway_are_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = cell("GPTQ act-order")
    path = found.write(tmp_path)
    monkeypatch.setenv(QUANTIZE, "8bit")
    model = load(path)
    assert parameters(model)[f"{SWITCH}.weight"].dtype == mx.uint32
    assert compare(model, found.reference, 0.1).word == "right"


Break = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def drop(*ends: str) -> Break:
    def run(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for end in ends:
            del tensors[end]

    return run


def change(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    def run(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[name] = value(tensors[name])

    return run


def setting(**values: Any) -> Break:
    return lambda tensors, config: config.update(values)


def scheme(**values: Any) -> Break:
    def run(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"] |= values

    return run


BROKEN: dict[str, tuple[str, Break, str]] = {
    "no scale": ("int4", drop(f"{EXPERT}.weight_scale"), "has no weight_scale"),
    "no scale of int8": ("int8 W8A8", drop(f"{ATTENTION}.weight_scale"), "int8 without a scale"),
    "no zero points": (
        "int8 g64",
        drop(f"{ATTENTION}.weight_zero_point"),
        "has no weight_zero_point",
    ),
    "other group": (
        "int4",
        scheme(group_size=64),
        "down_proj.weight_scale is F16 .64, 3., expected .* .64, 2.",
    ),
    "other bits": (
        "int4",
        scheme(num_bits=8),
        "down_proj.weight_scale is F16 .64, 3., expected .* .64, 2.",
    ),
    "odd bits": ("int4", scheme(num_bits=3), "has integers of 3 bits"),
    "no integer group": ("int4", setting(config_groups={}), "has no integer group"),
    "another method": ("int4", setting(quant_method="gptq"), "has quant_method 'gptq'"),
    "no config": ("GPTQ", lambda t, c: c.clear(), "has no quant_method"),
    "scales of another length": (
        "int4",
        change(f"{ATTENTION}.weight_scale", lambda t: t[:, :1]),
        "is F16 .64, 1., expected",
    ),
    "zero points of another length": (
        "int8 g64",
        change(f"{ATTENTION}.weight_zero_point", lambda t: t[:-1]),
        "is I32 .15, 1., expected I32 .16, 1.",
    ),
    "weight_shape of three": (
        "int4",
        change(f"{ATTENTION}.weight_shape", lambda t: torch.tensor([1, 2, 3])),
        "has the shape .3., expected .2.",
    ),
    "another weight_shape": (
        "int4",
        change(f"{EXPERT}.weight_shape", lambda t: t + 1),
        "weight_shape is .97, 65., expected .96, 64.",
    ),
    "g_idx too short": (
        "GPTQ act-order",
        change(f"{ATTENTION}.g_idx", lambda t: t[:-1]),
        "is I32 .63., expected",
    ),
    "no g_idx": ("GPTQ act-order", drop(f"{ATTENTION}.g_idx"), "has no g_idx"),
    "no scales of GPTQ": ("GPTQ", drop(f"{ATTENTION}.scales"), "has no scales"),
    "no qzeros": ("GPTQ", drop(f"{ATTENTION}.qzeros"), "has no qzeros"),
    "bits of GPTQ": ("GPTQ", setting(bits=8), "expected 16 words for 8 bits"),
    "group of GPTQ": ("GPTQ", setting(group_size=64), "is F16 .3, 64., expected .* .2, 64."),
    "group of AWQ": ("AWQ", setting(group_size=128), "expected BF16 or F16 or F32 .1, 64."),
    "GPTQ as AWQ": ("GPTQ", setting(quant_method="awq"), "has quant_method 'awq'"),
    "AWQ as GPTQ": ("AWQ", setting(quant_method="gptq"), "has quant_method 'gptq'"),
    "AutoRound's other packing": (
        "AutoRound",
        setting(packing_format="auto_round:auto_awq"),
        "is packed as gptq, and config.json says awq",
    ),
    "AutoRound's unknown packing": (
        "AutoRound",
        setting(packing_format="auto_round:x"),
        "with packing_format 'auto_round:x'",
    ),
    "AWQ's gemv": ("AWQ", setting(version="gemv"), "with version 'gemv'"),
    "Marlin": ("GPTQ", setting(checkpoint_format="marlin"), "with checkpoint_format 'marlin'"),
    "a regular expression": (
        "AutoRound",
        setting(extra_config={"(": {"bits": 8}}),
        "names modules by",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_contradiction_is_refused_by_name(name: str, tmp_path: Path):
    form, break_, words = BROKEN[name]
    found = cell(form)
    config = json.loads(json.dumps(found.checkpoint.config))
    found.checkpoint.config = config
    break_(found.checkpoint.tensors, config["quantization_config"])
    path = found.write(tmp_path)
    with planned_loads() as plans, pytest.raises(CompatError, match=words) as error:
        load(path)
    check_agreement(path, plans, f"{error.type.__name__}: {error.value}")


VALUES: dict[str, tuple[str, Break, str]] = {
    "g_idx out of range": (
        "GPTQ act-order",
        change(f"{EXPERT}.g_idx", lambda t: t + 1),
        "a g_idx beyond the scales, where one of 2 groups",
    ),
    "g_idx in act order": (
        "GPTQ",
        change(f"{EXPERT}.g_idx", lambda t: t.flip(0)),
        "a g_idx in act order, where consecutive groups",
    ),
    "zero points that are not symmetric": (
        "GPTQ 3-bit",
        change(f"{EXPERT}.qzeros", lambda t: t + 1),
        "zero points other than the middle",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_contradicts_stops_the_load(name: str, tmp_path: Path):
    form, break_, words = VALUES[name]
    found = cell(form)
    break_(found.checkpoint.tensors, found.checkpoint.config)
    with pytest.raises(CompatError, match=words):
        load(found.write(tmp_path))


def test_weight_shapes_that_nobody_looked_at_are_compared_by_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of many weights only some are read before the load."""
    monkeypatch.setattr(contents, "MOST", 1)
    found = cell("int4")
    found.checkpoint.tensors[f"{EXPERT}.weight_shape"] += 1
    words = "a weight_shape of .97, 65., where .96, 64. was expected"
    with pytest.raises(CompatError, match=words):
        load(found.write(tmp_path))
