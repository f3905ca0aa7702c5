"""The stages of ``--pipeline-parallel-size``: which layers a rank has, and what it tells vLLM.

vLLM divides the layers (``VLLM_PP_LAYER_PARTITION`` included) and forms groups of the layers of all
ranks. Block sizes depend on all layers too, so the ranks tell each other theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from vllm.distributed.parallel_state import get_pp_group
from vllm.distributed.utils import get_pp_indices

from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer, StateLayer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_moe_compat.backend.vllm.rank_group import RankGroup


@dataclass(frozen=True, slots=True)
class AllLayers:
    """The layers of all ranks.

    Attributes:
        layers: in the model's order; ``index`` is the place in this list.
        own: the places of this rank's.
        heads: layers of the prediction heads, numbered after all others, as vLLM expects them;
            only one rank has any.
    """

    layers: list[Layer]
    own: range
    heads: list[AttentionLayer] = field(default_factory=list)

    @property
    def paged(self) -> list[Layer]:
        """Every layer for which vLLM assigns pages."""
        return [*self.layers, *self.heads]

    @property
    def own_paged(self) -> list[int]:
        """The places of this rank's layers in ``paged``."""
        return [*self.own, *range(len(self.layers), len(self.layers) + len(self.heads))]


def range_of(vllm_config: VllmConfig) -> Callable[[int], tuple[int, int]] | None:
    """Return the range of this rank by the number of layers; None if each rank has all layers."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages == 1:
        return None
    rank = get_pp_group().rank_in_group
    return lambda count: get_pp_indices(count, rank, stages)


def all_layers(
    own: Sequence[Layer], ranks: RankGroup | None, heads: Sequence[AttentionLayer] = ()
) -> AllLayers:
    """Return the layers of all ranks; all of them call it."""
    if ranks is None or get_pp_group().world_size == 1:
        count = len(own)
        numbered = [replace(layer, index=count + i) for i, layer in enumerate(heads)]
        return AllLayers(list(own), range(count), numbered)
    told: list[list[dict[str, Any]]] = ranks.exchange([_plain(layer) for layer in own])
    begin = sum(len(part) for part in told[: ranks.place.rank])
    every = [layer for part in told for layer in part]
    found = [_layer(layer | {"index": index}) for index, layer in enumerate(every)]
    return AllLayers(found, range(begin, begin + len(own)))


def _plain(layer: Layer) -> dict[str, Any]:
    """Return a layer as Python's own types, which can travel."""
    values = {each.name: getattr(layer, each.name) for each in fields(layer)}
    if isinstance(layer, StateLayer):
        values["dtypes"] = [str(dtype).rpartition(".")[2] for dtype in layer.dtypes]
    else:
        values["dtype"] = str(layer.dtype).rpartition(".")[2]
    return values


def _layer(values: dict[str, Any]) -> Layer:
    if "dtypes" in values:
        dtypes = tuple(getattr(mx, name) for name in values["dtypes"])
        return StateLayer(**values | {"dtypes": dtypes})
    return AttentionLayer(**values | {"dtype": getattr(mx, values["dtype"])})
