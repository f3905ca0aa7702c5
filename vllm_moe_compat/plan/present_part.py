"""Plan for the part of a checkpoint that is there, as a pipeline stage has it.

mlx-lm loads what it finds if ``load_model`` is not strict: its pipeline downloads only the shards
that hold a stage's layers. Such a shard may hold a piece of a further layer, too. Nobody computes
with that layer, so it is left out; of the others everything is checked as ever.
"""

from __future__ import annotations

from dataclasses import replace

from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.plan.planned_load import Headers


def present_part(headers: Headers) -> Headers:
    """Return the headers without layers of which the index puts a tensor into an absent file.

    Without an index, or with all of its files, they are returned as they are.
    """
    if headers.index is None:
        return headers
    absent = {name for name, file in headers.index.items() if file not in headers.stamps.files}
    if not absent:
        return headers
    layers = {layer.path for name in absent if (layer := layer_of(name))}

    def is_whole(name: str) -> bool:
        layer = layer_of(name)
        return layer is None or layer.path not in layers

    tensors = {name: info for name, info in headers.tensors.items() if is_whole(name)}
    index = {n: file for n, file in headers.index.items() if n not in absent and is_whole(n)}
    return replace(
        headers,
        tensors=tensors,
        index=index,
        pieces=tuple(name for name in headers.tensors if name not in tensors),
        absent=frozenset(absent),
    )
