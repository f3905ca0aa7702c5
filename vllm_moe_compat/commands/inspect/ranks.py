"""What each of several ranks would hold: with tensor parallelism, and with a pipeline.

The headers tell how many bytes a rank has; whether a layer can be divided is decided by the layer
itself when the model is loaded. What can be read off the config is said here already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vllm_moe_compat.checkpoint.config import sections
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.commands.inspect.model import Ranks, Stage
from vllm_moe_compat.dtypes import STORED_NAMES
from vllm_moe_compat.plan.estimate import Estimate, estimate
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.planner import Plan
from vllm_moe_compat.plan.serving import NONE
from vllm_moe_compat.ranks.expected import OUTSIDE, ranks_that_share

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
WITHOUT_STAGES = ("gemma3n", "gemma4", "gemma4_text", "nemotron_h")


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
    tied = bool(_number(planned.config, "tie_word_embeddings"))
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
    for length in partition(_layers(planned.config), count):
        end = begin + length

        def is_absent(name: str, begin: int = begin, end: int = end) -> bool:
            layer = layer_of(name)
            return (
                layer is not None
                and not begin <= layer.number < end
                and not OUTSIDE.search(layer.prefix)
            )

        builds = tuple(build for build in plan.builds if not is_absent(build.target))
        kept = {name: info for name, info in tensors.items() if not is_absent(name)}
        part = needs(replace(plan, builds=builds), kept)
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
    found = [
        f"{key} is {value:,}, which {count} ranks cannot divide equally"
        for key in _DIVIDED
        if (value := _number(config, key)) and value % count
    ]
    heads = _number(config, "num_key_value_heads")
    if heads and heads % count and count % heads:
        found.append(
            f"num_key_value_heads is {heads:,}, which {count} ranks can neither divide "
            "nor repeat equally"
        )
    return found


def _pipeline_refused(planned: PlannedLoad, count: int) -> str:
    layers = _layers(planned.config)
    if not layers:
        return "the config does not say how many layers there are"
    if layers < count:
        return f"{count} ranks need at least as many layers, and there are {layers:,}"
    if planned.module.rpartition(".")[2] in WITHOUT_STAGES:
        return f"the layers of {planned.module} hand on more than one array, or have no cache each"
    return ""


def _layers(config: Mapping[str, Any]) -> int:
    return _number(config, "num_hidden_layers") or _number(config, "num_layers")


def _number(config: Mapping[str, Any], key: str) -> int:
    """Return a whole number of an untrusted config; 0 if it has none."""
    values = (section.get(key) for section in sections(config))
    found = next((value for value in values if value is not None), 0)
    return found if isinstance(found, int) and 0 < found <= 2**24 else 0
