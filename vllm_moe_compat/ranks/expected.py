"""Which tensors a rank has, by their names: for estimates, before there is a model.

``spec`` knows it exactly, from a model of mlx-lm's. ``inspect`` and the check of memory before a
load have headers only. A tensor counts as divided by the name of its layer, unless a sibling
shows that the layer is of a kind that is whole on every rank, such as Mamba.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from vllm_moe_compat.checkpoint.config import sections
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.plan.planner import Plan

DIVIDED = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "qkvg_proj", "query_key_value", "Wqkv"),
        *("q_b_proj", "kv_b_proj", "embed_q", "unembed_out", "index_q_proj", "wq_b"),
        *("o_proj", "out_proj", "dense", "o_a_proj", "o_b_proj"),
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"),
        *("c_fc", "c_proj", "fc1", "fc2", "input_linear", "output_linear"),
        *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj_qkvz", "in_proj_ba"),
        *("a_proj", "b_proj", "g_proj", "f_proj", "f_b_proj", "g_b_proj"),
        *("conv1d", "q_conv1d", "k_conv1d", "v_conv1d", "qkv_conv"),
    )
)
"""Names of layers of which every rank has a part, where their block is divided."""
WHOLE = ("in_proj.weight", "conv.weight")
"""Siblings in a block that is whole on every rank: Mamba, short convolutions."""
OUTSIDE = re.compile(r"vision|visual|audio|projector|indexer|(?:^|\.)mtp\b|router|\.gate\.")
_HEADS = re.compile(r"(?:^|\.)lm_head\.")
DIVIDE_HEAD = ("qwen3_5", "qwen3_5_moe", "muse_spark")
"""Modules of mlx-lm whose output head ranks divide."""


def ranks_that_share(
    names: Iterable[str], ranks: int, module: str, *, tied: bool = False
) -> Callable[[str], int]:
    """Return a function that tells over how many ranks a tensor is divided.

    Args:
        names: names of all tensors of the checkpoint.
        ranks: the number of ranks.
        module: import path of the mlx-lm module.
        tied: whether the output head is the embedding.
    """
    if ranks == 1:
        return lambda name: 1
    whole = {
        name.removesuffix(end).rstrip(".") for name in names for end in WHOLE if name.endswith(end)
    }
    whole |= {block.removesuffix(".conv") for block in whole}
    head = module.rpartition(".")[2] in DIVIDE_HEAD and not tied

    @cache
    def count(name: str) -> int:
        if OUTSIDE.search(name):
            return 1
        if _HEADS.search(name):
            return ranks if head else 1
        steps = name.split(".")
        for number, step in enumerate(steps):
            stem = re.sub(r"_(?:blocks|scales|bias|packed)$", "", step)
            if stem in DIVIDED and number >= len(steps) - 3:
                return 1 if ".".join(steps[:number]) in whole else ranks
        return 1

    return count


def of_layers(
    plan: Plan, tensors: Mapping[str, TensorInfo], begin: int, end: int
) -> tuple[Plan, dict[str, TensorInfo]]:
    """Return the part of a plan, and of its tensors, that a rank of a pipeline loads.

    Args:
        plan: a plan for these tensors.
        tensors: the tensors.
        begin: the rank's first layer.
        end: the layer after its last one.
    """

    def is_present(name: str) -> bool:
        layer = layer_of(name)
        outside = layer is None or OUTSIDE.search(layer.prefix) is not None
        return outside or (layer is not None and begin <= layer.number < end)

    builds = tuple(build for build in plan.builds if is_present(build.target))
    kept = {name: info for name, info in tensors.items() if is_present(name)}
    return replace(plan, builds=builds), kept


def layer_count(config: Mapping[str, Any]) -> int:
    """Return the number of layers by the config; 0 if it does not say it."""
    return whole_number(config, "num_hidden_layers") or whole_number(config, "num_layers")


def whole_number(config: Mapping[str, Any], key: str) -> int:
    """Return a whole number of an untrusted config; 0 if it has none."""
    values = (section.get(key) for section in sections(config))
    found = next((value for value in values if value is not None), 0)
    return found if isinstance(found, int) and 0 < found <= 2**24 else 0


def cache_refusal() -> str:
    """Return why a load by several ranks is refused where experts stay on disk."""
    return f"{EXPERT_CACHE.name}={EXPERT_CACHE.read()} on several ranks; leave one of both out."
