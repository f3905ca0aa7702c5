"""Serve Mixture-of-Experts checkpoints with vLLM on MLX, in the form they are published in.

vLLM loads the plugin by itself. Anywhere else::

    import vllm_moe_compat, mlx_lm

    vllm_moe_compat.apply()
    model, tokenizer = mlx_lm.load("path/of/a/checkpoint")

Importing the package patches nothing and imports none of vllm, mlx, torch or
transformers; each function imports what it needs when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vllm_moe_compat._version import __version__

if TYPE_CHECKING:
    from vllm_moe_compat.load.patching import applied, apply, revert
    from vllm_moe_compat.probes.status import status

__all__ = ["__version__", "applied", "apply", "revert", "status"]

_LAZY = {
    "applied": "vllm_moe_compat.load.patching",
    "apply": "vllm_moe_compat.load.patching",
    "revert": "vllm_moe_compat.load.patching",
    "status": "vllm_moe_compat.probes.status",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
