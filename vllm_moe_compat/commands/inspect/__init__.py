"""``vllm-moe-compat inspect``: what a checkpoint is and what will be done, from headers alone.

``collect`` makes an ``Inspection`` of a path; ``text``, ``as_json`` and ``markdown`` write
it down. Nothing here imports MLX, mlx-lm, torch or transformers.
"""

from __future__ import annotations

from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.commands.inspect.model import SCHEMA_VERSION, Inspection, Problem

__all__ = ["SCHEMA_VERSION", "Inspection", "Problem", "inspect"]
