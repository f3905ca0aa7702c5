"""A small model in the exact form of Qwen's FP8 MoE releases, made on the spot.

It needs no download, is trained from text that Python ships, and says something
that can be checked. ``scripts/demo``, ``doctor`` and the tests use it::

    checkpoint = vllm_moe_compat.demo.build("/some/folder")
    oracle = vllm_moe_compat.demo.load_reference(checkpoint.path)

torch and transformers are imported when these are called, not before.
"""

from __future__ import annotations

from vllm_moe_compat.demo.builder import DemoCheckpoint, build, default_path
from vllm_moe_compat.demo.reference import load_reference

__all__ = ["DemoCheckpoint", "build", "default_path", "load_reference"]
