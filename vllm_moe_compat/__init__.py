"""Lets vLLM serve Mixture-of-Experts checkpoints on MLX as they are published.

Under vLLM the plugin loads itself. Anywhere else::

    import vllm_moe_compat, mlx_lm

    vllm_moe_compat.apply()
    model, tokenizer = mlx_lm.load("path/of/a/checkpoint")

Importing the package imports none of vllm, mlx, torch or transformers, and
patches nothing; the functions below load what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_moe_compat._version import __version__

if TYPE_CHECKING:
    from vllm_moe_compat.load.patching import applied, apply, revert, status

__all__ = ["__version__", "applied", "apply", "revert", "status"]

_LAZY = ("applied", "apply", "revert", "status")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from vllm_moe_compat.load import patching

        return getattr(patching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
