"""Packed integers become their values as floats, and MLX's words of the same values."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from support.loading import same_bits
from support.packed import (
    PackedForm,
    auto_round_form,
    awq_form,
    gptq_form,
    int_form,
    pack_form,
)
from support.stored import stored
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers import Numbers, find_numbers
from vllm_moe_compat.checkpoint.operations import MlxFormat
from vllm_moe_compat.execute import stack
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.execute.numbers.awq_words import in_mlx_order
from vllm_moe_compat.execute.run_plan import tensor_infos
from vllm_moe_compat.plan.build import Build, Restriction
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts

HELD = [
    pack_form(4, 32),
    pack_form(4, 64),
    pack_form(4, 128),
    pack_form(4, 0),
    pack_form(8, 32),
    pack_form(8, 0),
    pack_form(2, 32),
    pack_form(4, 32, symmetric=False),
    pack_form(8, 64, symmetric=False),
    int_form(),
    int_form(32),
    int_form(symmetric=False),
    int_form(kind="naive-quantized"),
    *(gptq_form(bits, 32) for bits in (2, 3, 4, 8)),
    *(gptq_form(bits, 64, symmetric=True) for bits in (2, 3, 4, 8)),
    gptq_form(4, 0),
    gptq_form(4, 32, v2=True),
    gptq_form(8, 128, v2=True),
    awq_form(32),
    awq_form(64),
    awq_form(128),
    auto_round_form("gptq"),
    auto_round_form("awq"),
    auto_round_form("gptq", 8, 64),
]
FLOATS = [
    pack_form(4, 16),
    pack_form(4, 32, order=True),
    pack_form(8, 16, symmetric=False),
    int_form(16),
    gptq_form(4, 16),
    gptq_form(4, 32, order=True),
    gptq_form(3, 32, order=True),
    gptq_form(8, 32, order=True, v2=True),
    awq_form(16),
]


def by_name(form: PackedForm) -> str:
    return form.name


def arrays(state: dict[str, torch.Tensor]) -> dict[str, mx.array]:
    return {name: mx.array(value.numpy()) for name, value in state.items()}


def numbers_of(weights: dict[str, mx.array], form: PackedForm) -> Numbers:
    found = find_numbers(tensor_infos(weights), {"quantization_config": form.config})
    assert list(found.findings()) == []
    return found


def build_of(numbers: Numbers, names: list[str], *after: object, target: str = "m.weight") -> Build:
    op = numbers.dequantize(names[0])
    assert op is not None
    each = [numbers.stored(name) for name in names]
    roles = [role for role, _ in each[0].parts]
    parts = tuple((r, tuple(dict(one.parts)[r] for one in each)) for r in roles)
    before = (StackExperts(len(names)),) if len(names) > 1 else ()
    ops = (*before, op, *after)
    others = ("up.weight",) if after else ()
    return Build(target, tuple(o.tensor for o in each), parts, ops, others, held=op.held)  # type: ignore[arg-type]


def widened(made: dict[str, mx.array], name: str, held: MlxFormat) -> np.ndarray:
    """MLX's own values of the words, computed in float32."""
    scales, biases = (made[f"{name}.{k}"].astype(mx.float32) for k in ("scales", "biases"))
    return np.array(mx.dequantize(made[f"{name}.weight"], scales, biases, held.group, held.bits))


@pytest.mark.parametrize("form", [*HELD, *FLOATS], ids=by_name)
def test_floats_are_the_values_rounded_once(form: PackedForm):
    ints = form.draw(np.random.default_rng(0), 96, 128)
    for dtype in (mx.float32, mx.bfloat16):
        weights = arrays(form.store("m.weight", ints))
        build = build_of(numbers_of(weights, form), ["m.weight"])
        (made,) = make_build(build, weights, str(dtype).rpartition(".")[2]).values()
        assert weights == {}
        wanted = mx.array(ints.values).astype(dtype)
        assert made.dtype == dtype
        assert mx.array_equal(made, wanted).item()


@pytest.mark.parametrize("form", HELD, ids=by_name)
def test_mlx_dequantises_the_words_to_the_values_bit_for_bit(form: PackedForm):
    ints = form.draw(np.random.default_rng(1), 96, 128)
    weights = arrays(form.store("m.weight", ints))
    build = build_of(numbers_of(weights, form), ["m.weight"])
    assert build.held is not None
    made = make_build(build, weights, "bfloat16", formats=(build.held,))
    assert {k: (v.dtype, v.shape) for k, v in made.items()} == {
        f"m.{kind}": (made[f"m.{kind}"].dtype, spec.shape)
        for kind, spec in build.held.tensors((96, 128)).items()
    }
    assert made["m.weight"].dtype == mx.uint32
    assert np.array_equal(widened(made, "m", build.held), ints.values)
    # Half-precision scales stay where their biases are exact.
    assert (made["m.scales"].dtype == mx.float16) == form.symmetric
    assert made["m.biases"].dtype == made["m.scales"].dtype


@pytest.mark.parametrize("form", FLOATS, ids=by_name)
def test_what_mlx_cannot_hold_is_said_so(form: PackedForm):
    weights = arrays(form.store("m.weight", form.draw(np.random.default_rng(2), 96, 128)))
    op = numbers_of(weights, form).dequantize("m.weight")
    assert op is not None
    assert op.held is None


@pytest.mark.parametrize("form", [pack_form(4, 32), gptq_form(), awq_form()], ids=by_name)
@pytest.mark.parametrize("columns", [72, 40])
def test_rows_that_are_no_multiple_of_a_group_become_floats(form: PackedForm, columns: int):
    ints = form.draw(np.random.default_rng(3), 32, columns)
    weights = arrays(form.store("m.weight", ints))
    build = build_of(numbers_of(weights, form), ["m.weight"])
    assert build.held is None
    (made,) = make_build(build, weights, "float32").values()
    assert np.array_equal(np.array(made), ints.values)


def test_a_partial_last_group_is_held_in_smaller_groups():
    form = gptq_form(4, 64)
    ints = form.draw(np.random.default_rng(3), 32, 96)
    weights = arrays(form.store("m.weight", ints))
    build = build_of(numbers_of(weights, form), ["m.weight"])
    assert build.held is not None
    assert build.held.group == 32
    made = make_build(build, weights, "bfloat16", formats=(build.held,))
    assert np.array_equal(widened(made, "m", build.held), ints.values)


SHAPES = [pack_form(4, 32, symmetric=False), int_form(), gptq_form(3, 32), gptq_form(), awq_form()]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", SHAPES, ids=by_name)
def test_stacking_and_splitting_work_on_words(
    form: PackedForm, interleaved: bool, monkeypatch: pytest.MonkeyPatch
):
    # Bands of a few rows, and a few experts at a time.
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 4 * 128 * 40)
    generator = np.random.default_rng(4)
    ints = [form.draw(generator, 64, 128) for _ in range(5)]
    names = [f"experts.{e}.gate_up.weight" for e in range(5)]
    state = {}
    for name, one in zip(names, ints, strict=True):
        state |= form.store(name, one)
    weights = arrays(state)
    build = build_of(
        numbers_of(weights, form), names, SplitGateUp(interleaved), target="gate.weight"
    )
    assert build.held is not None
    made = make_build(build, dict(weights), "bfloat16", formats=(build.held,) * 2)
    values = np.stack([one.values for one in ints])
    gate, up = (values[:, ::2], values[:, 1::2]) if interleaved else np.split(values, 2, axis=1)
    assert np.array_equal(widened(made, "gate", build.held), gate)
    assert np.array_equal(widened(made, "up", build.held), up)
    floats = make_build(build, dict(weights), "float32")
    assert np.array_equal(np.array(floats["gate.weight"]), gate)
    assert np.array_equal(np.array(floats["up.weight"]), up)


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "combined"])
@pytest.mark.parametrize("form", SHAPES, ids=by_name)
@pytest.mark.parametrize(
    "part",
    [
        Restriction(experts=(1, 3)),
        Restriction(rows=(40, 60)),
        Restriction(columns=(32, 96)),
        Restriction(experts=(2, 3), rows=(8, 32), columns=(64, 128)),
        Restriction(columns=(8, 24)),
    ],
    ids=str,
)
def test_a_restricted_build_makes_that_part(
    form: PackedForm, part: Restriction, stacked: bool, tmp_path: Path
):
    generator = np.random.default_rng(5)
    ints = [form.draw(generator, 64, 128) for _ in range(4)]
    names = [f"experts.{e}.up.weight" for e in range(4)]
    state = {}
    for name, one in zip(names, ints, strict=True):
        state |= form.store(name, one)
    if stacked:
        each = [form.store("m.weight", one) for one in ints]
        state = {name: torch.stack([one[name] for one in each]) for name in each[0]}
        names = ["m.weight"]
    weights = arrays(state)
    tensors: dict[str, TensorInfo] = tensor_infos(weights)
    whole = build_of(numbers_of(weights, form), names)
    assert whole.held is not None
    build = whole.restricted(part)
    values = np.stack([one.values for one in ints])
    cut = tuple(slice(*(s or (None, None))) for s in (part.experts, part.rows, part.columns))
    wanted = values[cut]
    (made,) = make_build(build, dict(weights), "float32").values()
    assert np.array_equal(np.array(made), wanted)
    assert build.results(tensors, "F32")[0].shape == wanted.shape
    assert build.bytes_read(tensors) <= sum(a.nbytes for a in weights.values())
    files = stored(tmp_path, weights, tensors)
    assert same_bits(make_build(build, dict(files), "float32"), {"m.weight": made})
    # Shapes and orders of columns are counted as a whole, and not all are read.
    flat = sum(weights[name].nbytes for name in build.sources if _is_flat(weights, name, build))
    assert 0 <= build.bytes_read(tensors) - files.bytes_read <= flat
    if any(n % whole.held.group for n in part.columns or ()):
        assert build.held is None
        return
    assert build.held is not None
    packed = make_build(build, dict(weights), "bfloat16", formats=(build.held,))
    assert same_bits(make_build(build, dict(files), "bfloat16", formats=(build.held,)), packed)
    assert np.array_equal(widened(packed, "m", build.held), wanted)
    assert {k.rpartition(".")[2]: v.shape for k, v in packed.items()} == {
        kind: spec.shape for kind, spec in build.held.tensors(wanted.shape).items()
    }


def _is_flat(weights: dict[str, mx.array], name: str, build: Build) -> bool:
    return name.endswith("_shape") or weights[name].ndim < weights[build.weights[0]].ndim


def test_awqs_words_are_exchanged_alike_on_every_device():
    generator = np.random.default_rng(8)
    words = generator.integers(0, 2**32, (3, 64, 5), dtype=np.uint32)
    found = [np.array(make(mx.array(words))) for make in (in_mlx_order, _as_on_a_gpu)]
    assert np.array_equal(*found)


def _as_on_a_gpu(words: mx.array) -> mx.array:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
        return in_mlx_order(words)


@pytest.mark.parametrize("lead", [(3,), (2, 2)])
@pytest.mark.parametrize("form", SHAPES, ids=by_name)
def test_leading_axes_are_experts(form: PackedForm, lead: tuple[int, ...]):
    generator = np.random.default_rng(6)
    ints = [form.draw(generator, 32, 64) for _ in range(int(np.prod(lead)))]
    states = [form.store("m.weight", one) for one in ints]
    state = {
        name: torch.stack([s[name] for s in states]).reshape(*lead, *states[0][name].shape)
        for name in states[0]
    }
    weights = arrays(state)
    build = build_of(numbers_of(weights, form), ["m.weight"])
    (made,) = make_build(build, dict(weights), "float32").values()
    wanted = np.stack([one.values for one in ints]).reshape(*lead, 32, 64)
    assert np.array_equal(np.array(made), wanted)


PACKERS = {
    **{
        f"int{b} g{g}{' asym' if a else ''}": ("pack-quantized", b, g, a, False)
        for b, g, a in ((4, 32, False), (4, 0, False), (8, 64, False), (4, 64, True), (8, 0, True))
    },
    "int4 g32 act": ("pack-quantized", 4, 32, False, True),
    "W8A8": ("int-quantized", 8, 0, False, False),
    "W8A8 asym": ("int-quantized", 8, 0, True, False),
    "naive": ("naive-quantized", 8, 32, False, False),
}


@pytest.mark.parametrize("name", PACKERS)
def test_what_compressed_tensors_packs_is_what_it_unpacks(name: str):
    """Its own packer as a second oracle; GPTQ, AWQ and AutoRound have none that is installed."""
    form, bits, group, asymmetric, act_order = PACKERS[name]
    generator = np.random.default_rng(9)
    drawn = pack_form(bits, group, not asymmetric, act_order, np.float32).draw(generator, 96, 128)
    weights = QuantizationArgs(
        num_bits=bits,
        strategy="group" if group else "channel",
        group_size=group or None,
        symmetric=not asymmetric,
        actorder="group" if act_order else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {
        "weight": torch.from_numpy(drawn.values),
        "weight_scale": torch.from_numpy(drawn.scale),
        "weight_zero_point": torch.from_numpy(drawn.zero - 2 ** (bits - 1)).to(torch.int8),
    }
    if act_order:
        state["weight_g_idx"] = torch.from_numpy(drawn.order).to(torch.int32)
    packer = BaseCompressor.get_value_from_registry(form)
    packed = packer.compress(state, scheme)
    wanted = packer.decompress(packed, scheme)["weight"].float().numpy()
    assert np.array_equal(wanted, drawn.values)
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    stored = arrays({f"m.{key}": value for key, value in packed.items()})
    found = find_numbers(tensor_infos(stored), {"quantization_config": config})
    assert list(found.findings()) == []
    build = build_of(found, ["m.weight"])
    (made,) = make_build(build, dict(stored), "float32").values()
    assert np.array_equal(np.array(made), wanted)
    if build.held is not None:
        held = make_build(build, dict(stored), "float32", formats=(build.held,))
        assert np.allclose(widened(held, "m", build.held), wanted, rtol=1e-6, atol=1e-7)
    assert (build.held is None) == act_order
