"""FP4: held bit for bit, dequantised by the definition, refused where it contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

import vllm_moe_compat
from parity import fp4
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, Cell, build
from parity.mlx_families import FAMILIES as MLX_FAMILIES
from parity.test_without_transformers import checkpoint
from parity.verdict import compare, judge, stock
from support.agreement import check_agreement, planned_loads
from support.checkpoints import Checkpoint
from support.loading import TOKENS, load, new_model, parameters, read, same_bits
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.numbers.fp4_ops import GLOBAL, SCALE, DequantizeFp4
from vllm_moe_compat.commands.convert.conversion import Options, convert
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.execute import stack
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.execute.numbers import executor_of
from vllm_moe_compat.families.global_scale import take_global_scale
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.plan.build import Restriction
from vllm_moe_compat.plan.planner import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
MLX_GLOBAL = 6.0 * 448.0
LAYER = "model.layers.0"


@pytest.fixture(autouse=True)
def _hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def cell(family: str, form: str) -> Cell:
    """A cell whose tensors may be replaced."""
    made = build(FAMILIES[family], FORM_BY_NAME[form])
    return Cell(
        Checkpoint(dict(made.checkpoint.tensors), json.loads(json.dumps(made.checkpoint.config))),
        made.reference,
    )


def as_mlx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.contiguous().view(torch.uint8).numpy())


# --- values -------------------------------------------------------------------


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4"])
def test_every_value_by_every_scale_is_that_of_the_definition(mode: str, dtype: str, divides: bool):
    group = fp4.GROUPS[mode]
    codes = torch.arange(16, dtype=torch.uint8).repeat(group // 16)
    packed = (codes[0::2] + 16 * codes[1::2]).repeat(256, 1)
    kind = torch.float8_e4m3fn if mode == "nvfp4" else torch.float8_e8m0fnu
    scale = torch.arange(256, dtype=torch.uint8)[:, None].view(kind)
    shared = torch.tensor(0.0371)
    parts = {SCALE: as_mlx(scale)[None]}
    op = DequantizeFp4(mode, mode == "nvfp4", divides)
    if mode == "nvfp4":
        parts[GLOBAL] = mx.array([1 / shared.item() if divides else shared.item()])
    executor = executor_of(op)
    ready = executor.ready(op, parts, (1, *packed.shape))
    found = executor.floats(op, as_mlx(packed)[None], ready, slice(0, 1), slice(0, 256), dtype)
    exact = fp4.dequantize(packed, scale, torch.tensor(1.0)).numpy()
    if mode == "nvfp4":
        factor = np.float32(parts[GLOBAL].item())
        exact = exact / factor if divides else exact * factor
    wanted = torch.from_numpy(exact).to(getattr(torch, dtype)).float().numpy()
    finite = np.isfinite(exact)
    assert finite.sum() > 16 * 253 * group / 16
    assert np.array_equal(np.array(found[0].astype(mx.float32))[finite], wanted[finite])


def packed_by_compressed_tensors(mode: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of one weight as its packer writes them, and the values as it unpacks them."""
    torch.manual_seed(4)
    weight = torch.randn(48, 96)
    group = fp4.GROUPS[mode]
    strategy = "tensor_group" if mode == "nvfp4" else "group"
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy=strategy,
        group_size=group,
        symmetric=True,
        scale_dtype=torch.float8_e4m3fn if mode == "nvfp4" else torch.uint8,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    largest = weight.reshape(48, -1, group).abs().amax(-1) / 6
    state = {"weight": weight}
    if mode == "nvfp4":
        shared = (448 * 6 / weight.abs().max()).reshape(1)
        state["weight_global_scale"] = shared
        state["weight_scale"] = (largest * shared).to(torch.float8_e4m3fn).float()
    else:
        state["weight_scale"] = 2.0 ** torch.ceil(torch.log2(largest))
    packer = NVFP4PackedCompressor if mode == "nvfp4" else MXFP4PackedCompressor
    packed = packer.compress(state, scheme)
    # ``decompress`` works in bfloat16; these are its two steps in float32.
    values = unpack_fp4_from_uint8(packed["weight_packed"], 48, 96, dtype=torch.float32)
    scale = packed["weight_scale"]
    scale = scale.float() if mode == "nvfp4" else 2.0 ** (scale.float() - 127)
    shared = packed.get("weight_global_scale")
    return packed, dequantize(values, scale, global_scale=shared, dtype=torch.float32)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4"])
def test_what_compressed_tensors_packs_is_what_it_unpacks(mode: str):
    tensors, wanted = packed_by_compressed_tensors(mode)
    assert {"weight_packed", "weight_scale"} <= tensors.keys()
    kinds = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
    infos = {f"a.{n}": TensorInfo(kinds[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    numbers = detect(infos, {}).numbers
    assert [found.form.name for found in numbers.found] == [mode]
    assert not list(numbers.findings())
    op = numbers.dequantize("a.weight")
    assert isinstance(op, DequantizeFp4)
    parts = {SCALE: as_mlx(tensors["weight_scale"])[None]}
    if op.shared:
        parts[GLOBAL] = mx.array(tensors["weight_global_scale"].numpy())
    executor = executor_of(op)
    ready = executor.ready(op, parts, (1, *tensors["weight_packed"].shape))
    given = as_mlx(tensors["weight_packed"])[None]
    found = executor.floats(op, given, ready, slice(0, 1), slice(0, 48), "float32")
    # It rounds scale / global scale before the product; the definition rounds once.
    assert np.allclose(np.array(found[0]), wanted.numpy(), rtol=3e-7, atol=0)


# --- held ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["NVFP4", "ModelOpt NVFP4", "MXFP4"])
def test_the_bytes_are_held_as_they_are(form: str, tmp_path: Path):
    made = cell("qwen3_moe", form)
    stored = made.checkpoint.tensors
    model, config = mlx_lm.utils.load_model(made.write(tmp_path))
    found = parameters(model)
    packed = "_packed" if form != "ModelOpt NVFP4" else ""
    factor = "_scale_2" if form == "ModelOpt NVFP4" else "_global_scale"
    for name in ("gate", "up", "down"):
        stem = f"{LAYER}.mlp.experts.{{}}.{name}_proj.weight"
        target = f"{LAYER}.mlp.switch_mlp.{name}_proj"
        bytes_ = torch.stack([stored[stem.format(e) + packed] for e in range(4)])
        scales = torch.stack([stored[stem.format(e) + "_scale"] for e in range(4)])
        words = found[f"{target}.weight"]
        assert words.dtype == mx.uint32
        assert mx.array_equal(words.view(mx.uint8), as_mlx(bytes_))
        assert mx.array_equal(found[f"{target}.scales"], as_mlx(scales))
        if form == "MXFP4":
            assert f"{target}.global_scale" not in found
            continue
        shared = torch.stack([stored[stem.format(e) + factor].reshape(()) for e in range(4)])
        shared = shared if form == "ModelOpt NVFP4" else 1 / shared
        assert len(shared.unique()) > 1
        mine = np.array(found[f"{target}.global_scale"])
        assert mine.dtype == np.float32
        assert np.allclose(mine, MLX_GLOBAL * shared.numpy(), rtol=2e-7, atol=0)
    mode = "mxfp4" if form == "MXFP4" else "nvfp4"
    assert (config["quantization"]["mode"], config["quantization"]["bits"]) == (mode, 4)
    assert model.model.layers[0].self_attn.q_proj.mode == mode
    report = last_report()
    assert report is not None
    assert (report.held_packed, report.dequantized) == (32, 0)


def test_gate_and_up_of_combined_experts_may_have_a_global_scale_each(tmp_path: Path):
    made = cell("qwen3_moe", "ModelOpt NVFP4 combined")
    tensors = made.checkpoint.tensors
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        scale = tensors[f"{stem}_weight_scale"].float()
        rows = scale.shape[1] // 2
        scale[:, rows:] *= 0.5
        tensors[f"{stem}_weight_scale"] = scale.to(torch.float8_e4m3fn)
        shared = tensors[f"{stem}_weight_scale_2"]
        tensors[f"{stem}_weight_scale_2"] = torch.stack((shared, 2 * shared), -1)
    verdict = judge(made.write(tmp_path), made.reference, 1e-5)
    assert verdict.word == "right", verdict
    report = last_report()
    assert report is not None
    assert report.held_packed == 12


WIDE = 1 << 14


def widened(made: Cell) -> Cell:
    """The cell with experts of zeros that are ``WIDE``, beside which nothing else counts."""
    tensors = made.checkpoint.tensors
    for name, tensor in list(tensors.items()):
        if ".experts." in name and tensor.ndim > 1:
            *lead, rows, columns = tensor.shape
            down = "down_proj" in name
            columns = columns * WIDE // 96 if down else columns
            rows = rows if down else rows * WIDE // 96
            tensors[name] = torch.zeros(*lead, rows, columns, dtype=torch.uint8).view(tensor.dtype)
    made.checkpoint.config["moe_intermediate_size"] = WIDE
    return made


@pytest.mark.parametrize(
    ("form", "share"),
    # Of combined experts, the gate and up of a layer are one tensor that is read as a whole.
    [("NVFP4", 0.25), ("MXFP4", 0.25), ("FP4 of DeepSeek", 0.25), ("ModelOpt NVFP4 combined", 0.7)],
)
def test_loading_holds_a_fraction_of_a_layer_more_than_the_result(
    form: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 1 << 18)
    folder = widened(cell("qwen3_moe", form)).write(tmp_path)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load(folder)
    peak = mx.get_peak_memory() - before
    held = parameters(model)
    final = sum(array.nbytes for array in held.values())
    layer = sum(a.nbytes for n, a in held.items() if n.startswith(f"{LAYER}.mlp.switch_mlp"))
    assert 2 * layer > 0.9 * final
    assert peak < final + share * layer
    found = inspect(str(folder))
    assert found.memory is not None
    assert 0.98 * final < found.memory.needs[0].weights < 1.02 * final


# --- layers with a global scale -----------------------------------------------


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


# --- converted ----------------------------------------------------------------


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


# --- regions ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3_moe", "NVFP4"),
        ("qwen3_moe", "ModelOpt NVFP4 combined"),
        ("qwen3_moe", "MXFP4"),
        ("llama4", "ModelOpt NVFP4 combined"),  # stored turned
    ],
)
@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize(
    "to",
    [
        Restriction(experts=(1, 3)),
        Restriction(rows=(8, 24)),
        Restriction(columns=(32, 64)),
        Restriction(experts=(2, 3), rows=(5, 9)),
    ],
)
def test_a_part_of_a_target_is_that_part(
    family: str, form: str, hold: bool, to: Restriction, tmp_path: Path
):
    folder = cell(family, form).write(tmp_path)
    tensors = read_headers(folder)
    config = json.loads((folder / "config.json").read_text())
    row = TRANSFORMS_BY_MODULE[f"mlx_lm.models.{family}"]
    plan = make_plan(detect(tensors, config, row.ignored), row, config, hold=hold)
    assert row.moe is not None
    builds = [build for build in plan.builds if f".{row.moe.target}." in build.target]
    assert builds
    for one in builds[:3]:
        formats = [one.held] * len(one.targets) if hold else []
        whole = make_build(one, read(folder), "float32", formats=formats)
        part = make_build(one.restricted(to), read(folder), "float32", formats=formats)
        assert part.keys() == whole.keys()
        for name, array in whole.items():
            if to.experts is not None:
                array = array[slice(*to.experts)]
            if not name.endswith(".global_scale"):
                if to.rows is not None:
                    array = array[..., slice(*to.rows), :]
                if to.columns is not None:
                    width = {"scales": fp4.GROUPS["mxfp4" if form == "MXFP4" else "nvfp4"]}
                    per = width.get(name.rpartition(".")[2], 8) if hold else 1
                    array = array[..., to.columns[0] // per : to.columns[1] // per]
            assert mx.array_equal(part[name], array), name


# --- malformed ----------------------------------------------------------------

Q = f"{LAYER}.self_attn.q_proj.weight"
E = f"{LAYER}.mlp.experts.2.up_proj.weight"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, str], None]


def drop(ending: str) -> Change:
    return lambda tensors, name: tensors.pop(name + ending) is None


def put(ending: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: Tensors, name: str) -> None:
        tensors[name + ending] = make(tensors[name + ending])

    return change


MALFORMED: dict[str, tuple[str, Change, str]] = {
    "no scale": ("NVFP4", drop("_scale"), "is NVFP4 without a scale, expected weight_scale"),
    "no global scale": ("NVFP4", drop("_global_scale"), "is NVFP4 without a global scale"),
    "no second scale": ("ModelOpt NVFP4", drop("_scale_2"), "is NVFP4 without a global scale"),
    "no bytes": ("NVFP4", drop("_packed"), "scales a weight that is missing"),
    "no bytes of ModelOpt": ("ModelOpt NVFP4", drop(""), "scales a weight that is missing"),
    "groups of 32": (
        "NVFP4",
        put("_scale", lambda t: t[:, ::2]),
        r"_scale has the shape \[\d+, 2\] for NVFP4 bytes of \[\d+, 32\], expected \[\d+, 4\]",
    ),
    "MXFP4 in groups of 16": (
        "MXFP4",
        put("_scale", lambda t: t.repeat_interleave(2, -1)),
        r"_scale has the shape \[\d+, 4\] for MXFP4 bytes",
    ),
    "odd columns": ("NVFP4", put("_packed", lambda t: t[:, :-1]), "62 columns in pairs"),
    "flat bytes": ("NVFP4", put("_packed", lambda t: t.flatten()), "is NVFP4 of shape"),
    "float scales": ("NVFP4", put("_scale", torch.Tensor.float), "holds F32 scales of packed"),
    "a global scale per row": (
        "NVFP4",
        put("_global_scale", lambda t: t.repeat(64)),
        r"is F32 of shape \[64\] for NVFP4 bytes .* expected one float for a matrix",
    ),
    "an integer global scale": (
        "ModelOpt NVFP4",
        put("_scale_2", lambda t: t.int()),
        r"is I32 of shape \[\] for NVFP4 bytes",
    ),
}


@pytest.mark.parametrize("name", [Q, E])
@pytest.mark.parametrize("fault", MALFORMED)
def test_a_fault_is_named_before_a_tensor_is_read(fault: str, name: str, tmp_path: Path):
    form, change, message = MALFORMED[fault]
    made = cell("qwen3_moe", form)
    change(made.checkpoint.tensors, name)
    folder = made.write(tmp_path)
    with planned_loads() as plans, pytest.raises(ValueError, match=message) as caught:
        mlx_lm.utils.load_config(folder)
    assert name.removesuffix("weight") in str(caught.value)
    check_agreement(folder, plans, str(caught.value))


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        ("NVFP4", {"quant_method": "gptq"}, "is NVFP4, and config.json says quant_method 'gptq'"),
        ("ModelOpt NVFP4", {"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ("MXFP4", {"format": "nvfp4-pack-quantized"}, "is MXFP4, and config.json says format"),
        ("NVFP4", {"format": "float-quantized"}, "is NVFP4, and config.json says format"),
        ("ModelOpt NVFP4", {"quant_algo": "FP8"}, "is NVFP4, and config.json says quant_algo"),
    ],
)
def test_a_config_of_another_form(form: str, config: dict[str, Any], message: str, tmp_path: Path):
    made = cell("qwen3_moe", form)
    made.checkpoint.config["quantization_config"] |= config
    folder = made.write(tmp_path)
    with planned_loads() as plans, pytest.raises(ValueError, match=message) as caught:
        load(folder)
    check_agreement(folder, plans, str(caught.value))


def test_settings_may_be_in_hf_quant_config(tmp_path: Path):
    made = cell("qwen3_moe", "ModelOpt NVFP4")
    del made.checkpoint.config["quantization_config"]
    made.files["hf_quant_config.json"] = {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16},
    }
    folder = made.write(tmp_path)
    with planned_loads() as plans:
        verdict = judge(folder, made.reference, 1e-5)
    assert verdict.word == "right", verdict
    check_agreement(folder, plans, None)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("form", ["NVFP4", "ModelOpt NVFP4", "MXFP4"])
def test_tensors_without_headers_become_floats(family: str, form: str, tmp_path: Path):
    made = cell(family, form)
    folder = made.write(tmp_path)
    wanted = build(FAMILIES[family], FORM_BY_NAME[form]).reference
    model = new_model({k: v for k, v in made.checkpoint.config.items() if "quant" not in k})
    model.load_weights(list(model.sanitize(read(folder)).items()))
    assert compare(model, wanted, 1e-5).word == "right"


# --- modules that read FP4 themselves -----------------------------------------


def test_deepseeks_newest_module_keeps_its_own_forms():
    experts = {f"layers.0.ffn.experts.{e}.w1": (96, 64) for e in range(4)}
    tensors: dict[str, TensorInfo] = {}
    for name, (rows, columns) in experts.items():
        tensors[f"{name}.weight"] = TensorInfo("I8", (rows, columns // 2))
        tensors[f"{name}.scale"] = TensorInfo("F8_E8M0", (rows, columns // 32))
    tensors["layers.0.attn.wq_a.weight"] = TensorInfo("F8_E4M3", (64, 64))
    tensors["layers.0.attn.wq_a.scale"] = TensorInfo("F8_E8M0", (2, 2))
    layout = detect(tensors, {"quantization_config": {"quant_method": "fp8"}})
    assert {found.form.name for found in layout.numbers.found} == {"fp8", "mxfp4"}
    row = TRANSFORMS_BY_MODULE["mlx_lm.models.deepseek_v41"]
    plan = make_plan(layout, row, {}, hold=True)
    assert plan.empty
    assert plan.digested == 5


def test_kimi_k3s_experts_are_held(tmp_path: Path):
    (family,) = (found for found in MLX_FAMILIES if found.module == "kimi_k3")
    packed, floats = checkpoint(family, "published"), checkpoint(family, "published")
    generator = torch.Generator().manual_seed(5)
    experts = [n for n in packed.tensors if ".experts." in n and n.endswith(".weight")]
    assert experts
    for name in experts:
        rows, columns = packed.tensors.pop(name).shape
        bytes_ = torch.randint(0, 256, (rows, columns // 2), generator=generator)
        power = torch.randint(-8, -4, (rows, columns // 32), generator=generator)
        packed.tensors[f"{name}_packed"] = bytes_.to(torch.uint8)
        packed.tensors[f"{name}_scale"] = (power + 127).to(torch.uint8)
        exact = fp4.dequantize(bytes_, 2.0**power, torch.tensor(1.0))
        floats.tensors[name] = exact
    packed.config["quantization_config"] = fp4.config("ct mxfp4", [])
    held, plain = load(packed.write(tmp_path / "packed")), load(floats.write(tmp_path / "floats"))
    layer = held.layers[1].mlp.switch_mlp
    assert (layer.up_proj.mode, layer.up_proj.weight.dtype) == ("mxfp4", mx.uint32)
    found, wanted = (np.array(model(mx.array([TOKENS]))[0]) for model in (held, plain))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


# --- beside other forms, settings and modules ---------------------------------


def test_quark_names_its_bytes_weight(tmp_path: Path):
    made = cell("qwen3_moe", "MXFP4")
    tensors = made.checkpoint.tensors
    for name in [name for name in tensors if name.endswith("_packed")]:
        tensors[name.removesuffix("_packed")] = tensors.pop(name)
    made.checkpoint.config["quantization_config"] = {"quant_method": "quark"}
    verdict = judge(made.write(tmp_path), made.reference, 1e-5)
    assert verdict.word == "right", verdict
    report = last_report()
    assert report is not None
    assert report.held_packed == 32


def test_bytes_with_float_scales_are_no_fp4(tmp_path: Path):
    """ModelOpt's W4A8 AWQ has integers in bytes, and scales to divide activations by."""
    made = cell("qwen3_moe", "ModelOpt NVFP4")
    tensors = made.checkpoint.tensors
    tensors[f"{Q}_scale"] = tensors[f"{Q}_scale"].float()
    with (
        planned_loads() as plans,
        pytest.raises(ValueError, match=r"q_proj\.weight is U8") as caught,
    ):
        load(made.write(tmp_path))
    check_agreement(tmp_path, plans, str(caught.value))


@pytest.mark.parametrize("form", ["NVFP4", "MXFP4"])
def test_what_stays_packed_is_not_quantised_again(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "8bit")
    folder = cell("qwen3_moe", form).write(tmp_path)
    with planned_loads() as plans, pytest.raises(ValueError, match="stay packed") as caught:
        load(folder)
    check_agreement(folder, plans, str(caught.value))


@pytest.mark.parametrize("form", ["NVFP4", "ModelOpt NVFP4", "MXFP4"])
def test_a_module_without_a_row_is_refused(form: str, tmp_path: Path):
    made = cell("llama", form)
    made.checkpoint.config["model_type"] = "helium"
    folder = made.write(tmp_path)
    with planned_loads() as plans, pytest.raises(ValueError, match="cannot be patched") as caught:
        load(folder)
    assert ("MXFP4" if form == "MXFP4" else "NVFP4") in str(caught.value)
    check_agreement(folder, plans, str(caught.value))
