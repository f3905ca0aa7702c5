"""What a checkpoint is, from names, shapes and dtypes alone."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.numbers import infer_dtypes
from vllm_moe_compat.errors import CompatError, LayoutError

L = "model.layers.0.mlp"


def bf16(*names: str) -> dict[str, TensorInfo]:
    return dict.fromkeys(names, TensorInfo("BF16", (4, 4)))


def fp8(*names: str) -> dict[str, TensorInfo]:
    weights = dict.fromkeys(names, TensorInfo("F8_E4M3", (4, 4)))
    scales = {f"{name}_scale_inv": TensorInfo("F32", (1, 1)) for name in names}
    return weights | scales


def test_per_expert_indices_are_taken_as_they_are():
    names = [f"{L}.experts.{e}.up_proj.weight" for e in (0, 1, 7)]
    (block,) = detect(bf16(*names), {}).experts
    assert block.path == f"{L}.experts"
    assert list(block.per_expert["up"]) == [0, 1, 7]
    assert block.layouts == ("per-expert",)


@pytest.mark.parametrize("index", ["01", "-1", "1_0", "٣", "1" * 20, "x"])
def test_what_is_no_plain_index_is_no_expert(index: str):
    (block,) = detect(bf16(f"{L}.experts.{index}.up_proj.weight"), {}).experts
    assert not block.per_expert
    assert block.unrecognized


def test_combined_and_stacked_are_told_apart():
    combined = detect(bf16(f"{L}.experts.gate_up_proj", f"{L}.experts.down_proj"), {})
    assert [b.layouts for b in combined.experts] == [("combined",)]
    stacked = detect(bf16(f"{L}.switch_mlp.up_proj.weight", f"{L}.switch_mlp.up_proj.scales"), {})
    assert [b.layouts for b in stacked.experts] == [("stacked",)]


def test_shared_experts_are_no_routed_experts():
    names = ("shared_expert.up_proj.weight", "shared_experts.up_proj.weight", "gate.weight")
    assert not detect(bf16(*(f"{L}.{name}" for name in names)), {}).experts


def test_extras_are_set_aside_before_anything_else():
    tensors = fp8("mtp.layers.0.mlp.experts.3.up_proj.weight", "model.visual.x.weight")
    layout = detect(tensors, {}, Extras(("model.visual",), ("mtp.",)))
    assert not layout.tensors
    assert not layout.numbers.found
    assert not layout.experts
    assert layout.ignored == tensors.keys()


def test_scales_find_their_weights_in_two_and_three_dimensions():
    layout = detect(fp8("a.weight", f"{L}.experts.gate_up_proj"), {})
    assert {n: dict(f.weights[n].parts)["scale"] for n, f in layout.numbers.weights.items()} == {
        "a.weight": "a.weight_scale_inv",
        f"{L}.experts.gate_up_proj": f"{L}.experts.gate_up_proj_scale_inv",
    }


def test_e4m3_scales_of_packed_formats_are_no_fp8_weights():
    tensors = {
        "a.weight": TensorInfo("U8", (4, 8)),
        "a.weight_scale": TensorInfo("F8_E4M3", (4, 1)),
    }
    for described in (tensors, infer_dtypes(tensors)):
        assert [found.form.name for found in detect(described, {}).numbers.found] == ["nvfp4"]


def test_bytes_with_a_scale_and_bytes_without_any_are_fp8():
    u8 = TensorInfo("U8", (4, 4))
    scale = TensorInfo("F32", (1, 1))
    tensors = infer_dtypes({"a.weight": u8, "a.weight_scale_inv": scale, "b.weight": u8, "c": u8})
    assert [tensors[n].dtype for n in ("a.weight", "b.weight", "c")] == ["F8_E4M3"] * 2 + ["U8"]


def test_the_language_models_section_answers_first():
    config = {"num_experts": 3, "text_config": {"num_local_experts": 8}}
    assert detect(bf16(f"{L}.experts.0.up_proj.weight"), config).num_experts == 8


@pytest.mark.parametrize(
    "key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"]
)
def test_each_familys_key_counts(key: str):
    assert detect(bf16(f"{L}.experts.0.up_proj.weight"), {key: 5}).num_experts == 5


def test_a_block_comes_from_either_section():
    quantization = {"quantization_config": {"weight_block_size": [64, 32]}}
    assert detect(fp8("a.weight"), quantization).numbers.found[0].blocks == ((64, 32),)
    nested = {"text_config": quantization}
    assert detect(fp8("a.weight"), nested).numbers.found[0].blocks == ((64, 32),)


@pytest.mark.parametrize("value", [-1, "8", 2.0, True, [8]])
def test_a_count_that_means_nothing_is_refused(value: Any):
    with pytest.raises(LayoutError, match="num_experts"):
        detect(bf16(f"{L}.experts.0.up_proj.weight"), {"num_experts": value})


PART = st.sampled_from(
    [
        "model",
        "layers",
        "0",
        "1",
        "00",
        "٣",
        "mlp",
        "experts",
        "switch_mlp",
        "gate_up_proj",
        "up_proj",
        "weight",
        "weight_scale_inv",
        "activation_scale",
        "mtp",
        "visual",
        "",
    ]
)
NAME = st.lists(PART, max_size=7).map(".".join)
INFO = st.builds(
    TensorInfo,
    st.sampled_from(["BF16", "F8_E4M3", "F32", "U8", "F8_E8M0", "U32"]),
    st.lists(st.integers(0, 3), max_size=4).map(tuple),
)
CONFIG_KEYS = (
    "text_config",
    "num_experts",
    "hidden_size",
    "quantization_config",
    "weight_block_size",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(CONFIG_KEYS),
            inner,
        )
    ),
    max_leaves=6,
)


@given(st.dictionaries(NAME, INFO, max_size=12), st.dictionaries(st.text(max_size=3), JSON) | JSON)
def test_any_names_and_config_give_a_plan_or_a_named_refusal(tensors: Any, config: Any):
    from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
    from vllm_moe_compat.plan.planner import make_plan

    config = config if isinstance(config, dict) else {}
    for row in TRANSFORMS_BY_MODULE.values():
        with contextlib.suppress(CompatError):
            plan = make_plan(detect(tensors, config, row.ignored), row, config)
            sources = [name for build in plan.builds for name in build.sources]
            assert len(sources) == len(set(sources))
            assert set(sources) <= tensors.keys()


def test_a_norm_among_the_experts_is_no_expert():
    tensors = {
        "model.layers.0.mlp.experts.down_proj": TensorInfo("BF16", (2, 4, 8)),
        "model.layers.0.mlp.experts.post_expert_norm.weight": TensorInfo("BF16", (4,)),
    }
    (block,) = detect(tensors, {}).experts
    assert not block.unrecognized
    assert block.names() == ["model.layers.0.mlp.experts.down_proj"]
