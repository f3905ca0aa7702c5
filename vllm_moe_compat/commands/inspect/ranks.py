"""What each of several ranks would hold: with tensor parallelism, and with a pipeline.

The headers tell how many bytes a rank has; whether a layer can be divided is decided by the layer
itself when the model is loaded. What can be read off the config is said here already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.commands.inspect.model import Ranks, Stage
from vllm_moe_compat.dtypes import STORED_NAMES
from vllm_moe_compat.plan.estimate import Estimate, estimate
from vllm_moe_compat.plan.expert_cache import CacheSetting
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.planner import Plan
from vllm_moe_compat.plan.serving import NONE
from vllm_moe_compat.ranks.expected import (
    cache_refusal,
    layer_count,
    of_layers,
    ranks_that_share,
    whole_number,
)

# Settings that `--tensor-parallel-size` divides.
_DIVIDED = (
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
# Their layers hand on more than one array, or some have no cache.
WITHOUT_STAGES = (
    *("deepseek_v41", "gemma3n", "gemma4", "gemma4_text", "muse_spark", "nemotron_h"),
)


def ranks(planned: PlannedLoad, count: int) -> Ranks:
    """Describe ``count`` ranks of a load without faults."""
    assert planned.layout is not None, "it was planned"
    tensors = planned.layout.tensors
    plan = planned.plan_for(NONE) or Plan(planned.module, planned.layout.words)

    def needs(
        kept: Plan, of: Mapping[str, TensorInfo], shares: Callable[[str], int] = lambda _: 1
    ) -> Estimate:
        dtype, packed = planned.serving.dtype, planned.serving.packed_dtype
        return estimate(kept, of, STORED_NAMES[dtype], STORED_NAMES[packed], {}, shares)

    whole = needs(plan, tensors)
    tied = bool(whole_number(planned.config, "tie_word_embeddings"))
    shares = ranks_that_share(tensors, count, planned.module, tied=tied)
    part = needs(plan, tensors, shares)
    final = part.final[NONE]
    divided = (whole.final[NONE] - final) * count // (count - 1) if count > 1 else 0
    return Ranks(
        count=count,
        weights=final,
        loading=part.peak[NONE],
        divided=divided,
        whole=whole.final[NONE] - divided,
        tensor_refused=_tensor_refused(planned.config, count),
        stages=_stages(planned, plan, tensors, count, needs),
        pipeline_refused=_pipeline_refused(planned, count),
    )


def _stages(
    planned: PlannedLoad,
    plan: Plan,
    tensors: Mapping[str, TensorInfo],
    count: int,
    needs: Callable[..., Estimate],
) -> list[Stage]:
    if _pipeline_refused(planned, count):
        return []
    found, begin = [], 0
    for length in partition(layer_count(planned.config), count):
        end = begin + length
        part = needs(*of_layers(plan, tensors, begin, end))
        found.append(Stage(begin, end - 1, part.final[NONE], part.peak[NONE]))
        begin = end
    return found


def partition(layers: int, ranks: int) -> list[int]:
    """Return the number of layers of each rank, as vLLM divides them.

    Layers that are left over go to the ranks before the last one, which has the head.
    """
    each, left = divmod(layers, ranks)
    sizes = [each] * ranks
    for number in range(left):
        sizes[-2 - number] += 1
    return sizes


def _tensor_refused(config: Mapping[str, Any], count: int) -> list[str]:
    found = _cache_refused(count)
    found += [
        f"{key} is {value:,}, which {count} ranks cannot divide equally"
        for key in _DIVIDED
        if (value := whole_number(config, key)) and value % count
    ]
    heads = whole_number(config, "num_key_value_heads")
    if heads and heads % count and count % heads:
        found.append(
            f"num_key_value_heads is {heads:,}, which {count} ranks can neither divide "
            "nor repeat equally"
        )
    return found


def _cache_refused(count: int) -> list[str]:
    return [cache_refusal()] if count > 1 and CacheSetting.read() is not None else []


def _pipeline_refused(planned: PlannedLoad, count: int) -> str:
    if cache := _cache_refused(count):
        return cache[0]
    layers = layer_count(planned.config)
    if not layers:
        return "the config does not say how many layers there are"
    if layers < count:
        return f"{count} ranks need at least as many layers, and there are {layers:,}"
    if planned.module.rpartition(".")[2] in WITHOUT_STAGES:
        return f"the layers of {planned.module} hand on more than one array, or have no cache each"
    return ""
