"""Packed integers are found in any names, shapes and settings, or refused; nothing breaks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from support.packed import auto_round_form, awq_form, gptq_form, int_form, pack_form
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers import find_numbers
from vllm_moe_compat.checkpoint.numbers.int_settings import read_int_config
from vllm_moe_compat.checkpoint.numbers.ints import IntTensors
from vllm_moe_compat.errors import CompatError, LayoutError

ENDINGS = (
    *("qweight", "qzeros", "scales", "g_idx", "weight"),
    *(f"weight_{end}" for end in ("packed", "scale", "zero_point", "shape", "g_idx")),
)
DTYPES = ("I32", "I32", "I8", "F16", "BF16", "U8", "I64", "F8_E4M3")
SIZES = (0, 1, 2, 3, 4, 8, 16, 32, 64, 128)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 8, 16, 32, 64, 128, 1.5, 10**30),
    *("x", "gptq", "awq", "gptq_v2", "auto_round:auto_awq", "group", "channel"),
    *([], {}, {"a": {"bits": 4}}, ["re:.*", "Linear"], ["m"], {"-:a": {}, "+:m": {"bits": 8}}),
)
SETTINGS = (
    *("bits", "group_size", "sym", "desc_act", "checkpoint_format", "version", "zero_point"),
    *("packing_format", "extra_config", "dynamic", "config_groups", "is_marlin_format"),
)
WEIGHTS = ("num_bits", "type", "strategy", "group_size", "symmetric", "actorder")
FORMS = (pack_form(), int_form(), gptq_form(), awq_form(), auto_round_form("awq"))


def some(draw: random.Random, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: draw.choice(VALUES) for key in keys if draw.random() < 0.4}


def config(draw: random.Random) -> dict[str, Any]:
    form = draw.choice(FORMS).config
    changed = form | some(draw, SETTINGS)
    if draw.random() < 0.5:
        scheme = {"targets": draw.choice(VALUES), "weights": some(draw, WEIGHTS)}
        changed["config_groups"] = {"group_0": scheme}
    if draw.random() < 0.2:
        changed["quant_method"] = draw.choice(VALUES)
    return {"quantization_config": changed}


def tensors(draw: random.Random) -> dict[str, TensorInfo]:
    base = draw.choice(("m.", "model.layers.0.mlp.experts.gate_up_proj.", ""))
    found = {}
    for ending in ENDINGS:
        if draw.random() < 0.6:
            axes = draw.choice((0, 1, 2, 2, 2, 2, 3))
            shape = tuple(draw.choice(SIZES) for _ in range(axes))
            found[base + ending] = TensorInfo(draw.choice(DTYPES), shape)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_no_names_shapes_or_settings_break_it(seed: int):
    draw = random.Random(seed)
    seen = 0
    for _ in range(2000):
        given = tensors(draw)
        try:
            found = find_numbers(given, config(draw))
        except CompatError:
            continue
        faults = {finding.name for finding in found.findings()}
        for numbers in found.found:
            if isinstance(numbers, IntTensors):
                seen += 1
                assert numbers.details.weights == len(numbers.weights)
                for name, stored in numbers.weights.items():
                    # A weight has an operation, or a finding about one of its tensors.
                    assert (name in numbers.ops) != bool(faults & {*stored.names})
                    numbers.logical(name)
    assert seen > 100


def test_a_module_has_the_settings_of_the_first_pattern_that_matches():
    entry = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "dynamic": {r"+:.*\.up_proj$": {"bits": 8}, r"-:.*lm_head": {}, ".*": {"sym": False}},
    }
    read = read_int_config({"quantization_config": entry})
    up, down = read.of("model.layers.0.up_proj"), read.of("model.layers.0.down_proj")
    assert up is not None
    assert down is not None
    assert (up.bits, up.group, up.symmetric) == (8, 128, True)
    assert (down.bits, down.group, down.symmetric) == (4, 128, False)


def test_a_module_is_named_whole_or_by_its_last_names_before_any_pattern():
    extra = {
        "model.layers.0.mlp.up_proj": {"bits": 8},
        "self_attn.q_proj": {"group_size": 32},
        ".*proj": {"bits": 2},
        ".*another": {"bits": 3},
    }
    entry = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "extra_config": extra}
    read = read_int_config({"quantization_config": entry})
    found = {
        name: read.of(f"model.layers.0.{name}")
        for name in ("mlp.up_proj", "self_attn.q_proj", "mlp.gate_proj", "mlp.another", "x")
    }
    assert {name: (s.bits, s.group) for name, s in found.items() if s is not None} == {
        "mlp.up_proj": (8, 128),
        "self_attn.q_proj": (4, 32),
        "mlp.gate_proj": (2, 128),
        "mlp.another": (3, 128),
        "x": (4, 128),
    }


def test_a_pattern_that_is_none_is_named():
    entry = {"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {"bits": 8}}}
    with pytest.raises(LayoutError, match=r"names modules by '\('"):
        read_int_config({"quantization_config": entry})


def test_the_module_decides_among_equal_names():
    """GPTQ and AWQ have the same names: the scales' shape tells them apart."""
    gptq = {
        "a.qweight": TensorInfo("I32", (8, 64)),
        "a.qzeros": TensorInfo("I32", (2, 8)),
        "a.scales": TensorInfo("F16", (2, 64)),
    }
    awq = {
        "a.qweight": TensorInfo("I32", (64, 8)),
        "a.qzeros": TensorInfo("I32", (2, 8)),
        "a.scales": TensorInfo("F16", (2, 64)),
    }
    for given, form in ((gptq, gptq_form()), (awq, awq_form())):
        found = find_numbers(given, {"quantization_config": form.config})
        assert list(found.findings()) == []
        assert found.weights["a.weight"].logical("a.weight").shape == (64, 64)
