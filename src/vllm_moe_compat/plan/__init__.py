"""How a checkpoint becomes what a model wants, as data.

A plan lists every tensor that has to be made, with its sources and operations.
It is complete before a byte is read: whatever cannot be right is refused here.
"""

from __future__ import annotations

from vllm_moe_compat.plan.ops import (
    DequantizeBlockFp8,
    Op,
    QuantizeBlockFp8,
    StackExperts,
    UnstackExperts,
)
from vllm_moe_compat.plan.planner import Build, Plan, make_plan
from vllm_moe_compat.plan.row import Moe, Row, Workaround

__all__ = [
    "Build",
    "DequantizeBlockFp8",
    "Moe",
    "Op",
    "Plan",
    "QuantizeBlockFp8",
    "Row",
    "StackExperts",
    "UnstackExperts",
    "Workaround",
    "make_plan",
]
