"""A small model in the exact form of Qwen's FP8 MoE releases, trained on this machine.

It needs no download, since its text ships with Python, and its right output is known.
``scripts/demo``, ``doctor`` and the tests use it::

    checkpoint = vllm_moe_compat.demo.build("/some/folder")
    oracle = vllm_moe_compat.demo.load_reference(checkpoint.path)
    head = vllm_moe_compat.demo.load_reference_head(checkpoint.path)

torch and transformers are imported by these calls, not by the import.
"""

from __future__ import annotations

from vllm_moe_compat.demo.builder import DemoCheckpoint, build, default_path
from vllm_moe_compat.demo.reference import load_reference, load_reference_head

__all__ = ["DemoCheckpoint", "build", "default_path", "load_reference", "load_reference_head"]
