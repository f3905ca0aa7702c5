"""Refuse what needs all experts of a model, if some of them are on disk.

Upstream would do it to the other parameters without a word: write a copy without experts, quantise
everything else, drop the part of an adapter that is for experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.errors import SettingError


def _paths(model: Any) -> dict[str, Any]:
    """Return the containers of a model whose experts are on disk, by path."""
    # Without this module there is no such model.
    module = sys.modules.get("vllm_moe_compat.expert_cache.cached_experts")
    if module is None or not hasattr(model, "named_modules"):
        return {}
    return {p: m for p, m in model.named_modules() if isinstance(m, module.CachedExperts)}


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
    if any(_paths(model) for model in (*args, *kwargs.values())):
        raise _refusal("a copy of it would lack the others, and nothing was written", "write")
    return original(*args, **kwargs)


def quantize_hook(owner: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call upstream's function, unless it would leave the experts as they are.

    Args:
        owner: the module that holds the function.
        original: ``quantize_model(model, …)`` or ``dequantize_model(model)``.
        *args: its arguments, the model among them.
        **kwargs: its keyword arguments.

    Raises:
        SettingError: experts of the model are on disk; the model is unchanged.
    """
    if any(_paths(model) for model in (*args, *kwargs.values())):
        raise _refusal("another number form would not reach the others, and nothing was changed")
    return original(*args, **kwargs)


def load_weights_hook(
    owner: Any,
    original: Callable[..., Any],
    model: Any,
    file_or_weights: Any,
    *args: Any,
    **kw: Any,
) -> Any:
    """Call ``load_weights``, unless it has tensors for experts that are on disk.

    Args:
        owner: ``mlx.nn.Module``.
        original: its ``load_weights(self, file_or_weights, strict)``.
        model: the module.
        file_or_weights: names and arrays, or the path of a file.
        *args: further arguments.
        **kw: keyword arguments.

    Raises:
        SettingError: a tensor is for such an expert; nothing is loaded.
    """
    if paths := _paths(model):
        if isinstance(file_or_weights, str):
            _refuse_experts(paths, _names_in(file_or_weights), f"{file_or_weights}: ")
        else:
            file_or_weights = list(file_or_weights)
            _refuse_experts(paths, [name for name, _ in file_or_weights], "")
    return original(model, file_or_weights, *args, **kw)


def load_adapters_hook(
    owner: Any, original: Callable[..., Any], model: Any, adapter_path: Any
) -> Any:
    """Call ``load_adapters``, unless the adapter changes experts that are on disk.

    Args:
        owner: ``mlx_lm.utils``.
        original: its ``load_adapters(model, adapter_path)``.
        model: the model.
        adapter_path: the adapter's folder.

    Raises:
        SettingError: a tensor is for such an expert; the model is unchanged.
    """
    file = Path(adapter_path) / "adapters.safetensors"
    if (paths := _paths(model)) and file.is_file():
        _refuse_experts(paths, _names_in(str(file)), f"{file}: ")
    return original(model, adapter_path)


def _names_in(file: str) -> list[str]:
    import mlx.core as mx

    found: Any = mx.load(file)
    return list(found)


def _refuse_experts(paths: dict[str, Any], names: Iterable[str], where: str) -> None:
    layers = tuple(
        f"{path}.{name.partition('.')[0]}." if path else f"{name.partition('.')[0]}."
        for path, container in paths.items()
        for name in container.source.specs
    )
    if found := [name for name in names if name.startswith(layers)]:
        raise _refusal(
            f"{fold(sorted(found))} cannot be put there, and nothing was loaded", where=where
        )


def _refusal(why: str, remedy: str = "change", where: str = "") -> SettingError:
    return SettingError(
        f"{where}{EXPERT_CACHE.name}={EXPERT_CACHE.read()}: only a share of the model's "
        f"experts is in memory, so {why}; set it to off to {remedy} the model."
    )


GUARDED: dict[tuple[str, str], Callable[..., Any]] = {
    ("mlx_lm.utils", "save_model"): write_hook,
    ("mlx.nn", "Module.save_weights"): write_hook,
    ("mlx_lm.utils", "quantize_model"): quantize_hook,
    ("mlx_lm.utils", "dequantize_model"): quantize_hook,
    ("mlx_lm.utils", "load_adapters"): load_adapters_hook,
    ("mlx.nn", "Module.load_weights"): load_weights_hook,
}
"""Functions that take whole models, by module and name, and the hook of each."""
