"""Which tensors have to be made, and which are left alone."""

from __future__ import annotations

import pytest

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.checkpoint.numbers.fp8_ops import DequantizeFp8
from vllm_moe_compat.errors import LayoutError
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts
from vllm_moe_compat.plan.planner import Plan, make_plan

MOE = TRANSFORMS_BY_MODULE["mlx_lm.models.qwen3_5_moe"]
DENSE = TRANSFORMS_BY_MODULE["mlx_lm.models.qwen3_5"]
P = "model.language_model.layers.{}.mlp."


def per_expert(dtype: str, layers: int = 2, experts: int = 3) -> dict[str, TensorInfo]:
    tensors = {}
    for layer in range(layers):
        for e in range(experts):
            for name, shape in (("gate", (8, 4)), ("up", (8, 4)), ("down", (4, 8))):
                key = f"{P.format(layer)}experts.{e}.{name}_proj.weight"
                tensors[key] = TensorInfo(dtype, shape, "model.safetensors")
                if dtype == "F8_E4M3":
                    tensors[f"{key}_scale_inv"] = TensorInfo("F32", (1, 1), "model.safetensors")
    return tensors


def plan(tensors: dict[str, TensorInfo], row=MOE) -> Plan:
    config = {"num_experts": 3, "hidden_size": 4}
    return make_plan(detect(tensors, config, row.ignored), row, config)


def test_per_expert_bf16_is_only_stacked():
    found = plan(per_expert("BF16"))
    assert len(found.builds) == 6
    assert all(b.ops == (StackExperts(3),) and not b.parts for b in found.builds)
    assert (found.experts, found.stacked, found.dequantized) == (3, 2, 0)


def test_per_expert_fp8_is_stacked_and_then_dequantised():
    found = plan(per_expert("F8_E4M3"))
    (build, *_) = found.builds
    assert build.ops == (StackExperts(3), DequantizeFp8((128, 128)))
    assert build.parts == (("scale", tuple(f"{name}_scale_inv" for name in build.weights)),)
    assert found.dequantized == 18


def test_targets_keep_the_sources_prefix():
    (build, *_) = plan(per_expert("BF16")).builds
    assert build.target == f"{P.format(0)}switch_mlp.gate_proj.weight"


def test_experts_are_stacked_in_the_order_of_their_numbers():
    tensors = per_expert("BF16", experts=3)
    shuffled = dict(sorted(tensors.items(), reverse=True))
    (build, *_) = plan(shuffled).builds
    assert [name.split(".experts.")[1][0] for name in build.weights] == ["0", "1", "2"]


def test_builds_come_layer_by_layer():
    tensors = per_expert("F8_E4M3")
    for layer in (1, 0):
        key = f"model.language_model.layers.{layer}.self_attn.q_proj.weight"
        tensors[key] = TensorInfo("F8_E4M3", (4, 4))
        tensors[f"{key}_scale_inv"] = TensorInfo("F32", (1, 1))
    layers = [build.layer for build in plan(tensors).builds]
    assert len(layers) == 8
    assert layers == sorted(layers)


@pytest.mark.parametrize(
    "tensors",
    [
        {
            f"{P.format(0)}experts.gate_up_proj": TensorInfo("BF16", (3, 16, 4)),
            f"{P.format(0)}experts.down_proj": TensorInfo("BF16", (3, 4, 8)),
        },
        {f"{P.format(0)}switch_mlp.up_proj.{k}": TensorInfo("U32", (3,)) for k in ("weight",)},
        {"lm_head.weight": TensorInfo("BF16", (4, 4))},
        {},
    ],
)
def test_what_upstream_digests_has_no_build(tensors: dict[str, TensorInfo]):
    assert plan(tensors).empty


def test_combined_fp8_is_split_as_it_is_dequantised():
    name = f"{P.format(0)}experts.gate_up_proj"
    down = f"{P.format(0)}experts.down_proj"
    found = plan(
        {
            name: TensorInfo("F8_E4M3", (3, 16, 4)),
            f"{name}_scale_inv": TensorInfo("BF16", (3, 1, 1)),
            down: TensorInfo("BF16", (3, 4, 8)),
        }
    )
    build, other = found.builds
    stacked = P.format(0) + "switch_mlp"
    assert build.targets == (f"{stacked}.gate_proj.weight", f"{stacked}.up_proj.weight")
    assert build.weights == (name,)
    assert build.ops == (DequantizeFp8((128, 128)), SplitGateUp())
    # Upstream would rename the other half only together with the one that is gone.
    assert (other.target, other.weights, other.ops) == (f"{stacked}.down_proj.weight", (down,), ())


def test_stacked_fp8_is_dequantised_in_place():
    name = f"{P.format(0)}switch_mlp.up_proj.weight"
    tensors = {
        name: TensorInfo("F8_E4M3", (3, 8, 4)),
        f"{name}_scale_inv": TensorInfo("F32", (3, 1, 1)),
    }
    assert [b.target for b in plan(tensors).builds] == [name]


def test_a_dense_row_dequantises_and_never_stacks():
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors = {name: TensorInfo("F8_E4M3", (8, 4)), f"{name}_scale_inv": TensorInfo("F32", (1, 1))}
    found = plan(tensors, DENSE)
    assert (found.stacked, found.dequantized) == (0, 1)


def test_a_plan_is_data():
    first, second = plan(per_expert("F8_E4M3")), plan(per_expert("F8_E4M3"))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ({}, 64),
        ({"num_attention_heads": 4}, 64),
        ({"num_attention_heads": 0, "qk_nope_head_dim": 8}, 64),
        ({"num_attention_heads": 3, "qk_nope_head_dim": 8}, 64),
        ({"num_attention_heads": 4, "qk_nope_head_dim": 16}, 64),
    ],
)
def test_latent_attention_that_does_not_fit_the_config_is_named(config, rows):
    row = next(row for row in TRANSFORMS_BY_MODULE.values() if row.latent)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    tensors = {name: TensorInfo("BF16", (rows, 32), "model.safetensors")}
    with pytest.raises(LayoutError, match=r"^model\.safetensors: model\.layers\.0.*kv_b_proj"):
        make_plan(detect(tensors, config, row.ignored), row, config)
    sound = {"num_attention_heads": 4, "qk_nope_head_dim": 8}
    plan = make_plan(detect(tensors, sound, row.ignored), row, sound)
    assert [spec.shape for spec in plan.builds[0].results(tensors, "BF16")] == [
        (4, 32, 8),
        (4, 8, 32),
    ]
