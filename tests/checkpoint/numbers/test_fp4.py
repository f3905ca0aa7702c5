"""FP4: dequantised by the definition, held bit for bit, in little more memory than the result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize

import vllm_moe_compat
from parity import fp4
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, Cell, build
from parity.verdict import compare, judge
from support.fp4 import LAYER, MLX_GLOBAL, as_mlx, cell
from support.loading import load, new_model, parameters, read
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.numbers.fp4_ops import GLOBAL, SCALE, DequantizeFp4
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.execute import stack
from vllm_moe_compat.execute.numbers import executor_of
from vllm_moe_compat.load.report import last_report

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.fixture(autouse=True)
def _hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


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


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("form", ["NVFP4", "ModelOpt NVFP4", "MXFP4"])
def test_tensors_without_headers_become_floats(family: str, form: str, tmp_path: Path):
    made = cell(family, form)
    folder = made.write(tmp_path)
    wanted = build(FAMILIES[family], FORM_BY_NAME[form]).reference
    model = new_model({k: v for k, v in made.checkpoint.config.items() if "quant" not in k})
    model.load_weights(list(model.sanitize(read(folder)).items()))
    assert compare(model, wanted, 1e-5).word == "right"
