"""Which tensors ranks divide, by their names: for estimates, before there is a model.

``spec`` knows it exactly, from a model of mlx-lm's. ``inspect`` and the check of memory before a
load have headers only. A tensor counts as divided by the name of its layer, unless a sibling
shows that the layer is of a kind that is whole on every rank, such as Mamba.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache

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
