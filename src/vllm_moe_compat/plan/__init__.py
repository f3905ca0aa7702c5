"""How a checkpoint becomes what a model wants, as data.

A plan lists every tensor that has to be made, with its sources and operations.
It is complete before a byte is read: whatever cannot be right is refused here.
"""

from __future__ import annotations

from vllm_moe_compat.plan.ops import (
    QUANTIZE_SETTINGS,
    DequantizeBlockFp8,
    JoinGateUp,
    Op,
    QuantizeBlockFp8,
    Requantize,
    SplitGateUp,
    StackExperts,
    Unpack,
    UnstackExperts,
)
from vllm_moe_compat.plan.planner import Build, Plan, make_plan
from vllm_moe_compat.plan.row import Moe, Row, Workaround

__all__ = [
    "QUANTIZE_SETTINGS",
    "Build",
    "DequantizeBlockFp8",
    "JoinGateUp",
    "Moe",
    "Op",
    "Plan",
    "QuantizeBlockFp8",
    "Requantize",
    "Row",
    "SplitGateUp",
    "StackExperts",
    "Unpack",
    "UnstackExperts",
    "Workaround",
    "make_plan",
]
