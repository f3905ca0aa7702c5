"""How a checkpoint becomes what a model wants, as data.

A plan lists every tensor that has to be made, with its sources and operations.
It is complete before a byte is read: whatever cannot be right is refused here.
"""

from __future__ import annotations

from vllm_moe_compat.plan.forms import Form
from vllm_moe_compat.plan.inverse import Rewriting, plan_rewriting
from vllm_moe_compat.plan.ops import DequantizeFp8, Op, QuantizeFp8, StackExperts, UnstackExperts
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS, Requantize
from vllm_moe_compat.plan.planner import Build, Plan, make_plan
from vllm_moe_compat.plan.row import ConfigFix, Moe, Row, Workaround

__all__ = [
    "QUANTIZE_SETTINGS",
    "Build",
    "ConfigFix",
    "DequantizeFp8",
    "Form",
    "Moe",
    "Op",
    "Plan",
    "QuantizeFp8",
    "Requantize",
    "Rewriting",
    "Row",
    "StackExperts",
    "UnstackExperts",
    "Workaround",
    "make_plan",
    "plan_rewriting",
]
