"""The block of rows and columns under one FP8 scale, from shapes and config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.errors import LayoutError

Block: TypeAlias = tuple[int, int]
Shape: TypeAlias = tuple[int, ...]

DEFAULT_BLOCK = (128, 128)


def block_of(weight: Shape, scale: Shape, blocks: tuple[Block, ...]) -> Block | None:
    """Return the rows and columns that one scale covers.

    Args:
        weight: shape ``[…, O, I]``.
        scale: shape of its scales: ``[]``, ``[O, 1]``, ``[O]``, ``[1, I]``, a grid ``[o, i]`` or
            ``[o, 1, i, 1]``, with or without the weight's leading axes.
        blocks: the config's; 128x128 if empty.

    Returns:
        The block; None if the shapes do not fit each other.
    """
    if len(weight) < 2:
        return None
    *lead, rows, columns = weight
    if len(scale) == len(weight) + 2 and scale[-3] == scale[-1] == 1:
        # ModelOpt's FP8_PB_WO: [o, 1, i, 1], a broadcastable grid.
        scale = (*scale[:-4], scale[-4], scale[-2])
    for block in blocks or (DEFAULT_BLOCK,):
        if scale == (*lead, -(-rows // block[0]), -(-columns // block[1])):
            return block
    count = 1
    for size in scale:
        count *= size
    rest = scale[len(lead) :]
    if count == 1 or (lead and scale[: len(lead)] == tuple(lead) and set(rest) <= {1}):
        return rows, columns
    if scale in ((*lead, rows, 1), (*lead, rows)):
        return 1, columns
    if scale == (*lead, 1, columns):
        return rows, 1
    return None


def block_sizes(config: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return the rows and columns that share one scale, for every block in the config.

    DeepSeek's and Qwen's releases have ``weight_block_size``. compressed-tensors has
    ``block_structure``, or a ``group_size`` along the columns, per group of layers.

    Raises:
        LayoutError: a block is not two positive whole numbers.
    """
    found: list[Block] = []
    for entry in quantization_configs(config):
        if (value := entry.get("weight_block_size")) is not None:
            found.append(_block("weight_block_size", value))
        groups = entry.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                continue
            if (value := weights.get("block_structure")) is not None:
                if isinstance(value, str):
                    value = [int(n) for n in value.split("x") if n.isdigit()]
                found.append(_block("block_structure", value))
            elif weights.get("strategy") == "group":
                found.append(_block("group_size", [1, weights.get("group_size")]))
    return tuple(dict.fromkeys(found))


def _block(key: str, value: Any) -> Block:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in value)
    ):
        raise LayoutError(
            f"config.json: {key} is {value!r}, where two positive whole numbers "
            "were expected; download the config again or correct it."
        )
    return value[0], value[1]
