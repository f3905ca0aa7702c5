"""Refuse to write a model whose experts are on disk: the copy would lack them without a word."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.errors import SettingError

WRITERS = (("mlx_lm.utils", "save_model"), ("mlx.nn", "Module.save_weights"))
"""Functions that write a model's parameters, by module and name."""


def write_hook(owner: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call upstream's function, unless it would write a model without its experts.

    Args:
        owner: the module or class that holds the function.
        original: the function.
        *args: its arguments, the model among them.
        **kwargs: its keyword arguments.

    Raises:
        SettingError: experts of the model are on disk; nothing is written.
    """
    # Without this module there is no such model.
    if (cache := sys.modules.get("vllm_moe_compat.expert_cache.cached_experts")) is not None:
        for model in (*args, *kwargs.values()):
            modules = model.modules() if hasattr(model, "modules") else ()
            if any(isinstance(part, cache.CachedExperts) for part in modules):
                raise SettingError(
                    f"{EXPERT_CACHE.name}={EXPERT_CACHE.read()}: only a share of the model's "
                    "experts is in memory, so a copy of it would lack the others, and nothing was "
                    "written; set it to off to write the model."
                )
    return original(*args, **kwargs)
