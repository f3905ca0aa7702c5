"""Which component executes models in this process: ours, vllm-metal or vLLM itself.

The decision reads environment variables, looks for installed packages and for compiled
extensions, and imports none of them. It has no side effects, so vLLM may ask any number of
times, also before it forks.
"""

from __future__ import annotations

import importlib.util
import os
import platform as host
import sys

from vllm_moe_compat import envs

KERNEL_PACKAGES = ("vllm_xpu_kernels", "tpu_inference", "libtpu")


def mlx_installed() -> bool:
    """Return whether mlx and mlx-lm can be imported, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


def vllm_has_kernels() -> bool:
    """Return whether the installed vLLM has kernels for some device.

    CPU, CUDA and ROCm builds ship compiled extensions, XPU and TPU use packages of their own,
    and the ``empty`` build has neither. The version string proves nothing: it can be set when
    vLLM is installed.
    """
    if any(importlib.util.find_spec(name) is not None for name in KERNEL_PACKAGES):
        return True
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return False
    root = spec.submodule_search_locations[0]
    return any(
        name.startswith(("_C", "_rocm_C", "_moe_C")) and name.endswith((".so", ".pyd"))
        for name in os.listdir(root)
    )


def who_serves() -> tuple[str, str]:
    """Return the component that executes models here, and the reason.

    The first item is ``"embedded"`` (the MLX platform of this package), ``"vllm-metal"``,
    ``"vllm"`` (its own kernels), or ``"nobody"`` if the plugin is switched off or MLX is missing.

    Raises:
        SettingError: a ``VLLM_MOE_COMPAT*`` variable has an invalid value.
    """
    if envs.ENABLED.read() == "0":
        return "nobody", f"{envs.ENABLED.name}=0"
    choice = envs.BACKEND.read()
    if choice == "off":
        return "nobody", f"{envs.BACKEND.name}=off"
    if not mlx_installed():
        return "nobody", "mlx or mlx-lm is not installed"
    if choice == "embedded":
        return "embedded", f"{envs.BACKEND.name}=embedded"
    if (
        sys.platform == "darwin"
        and host.machine() == "arm64"
        and importlib.util.find_spec("vllm_metal") is not None
    ):
        return "vllm-metal", "Apple Silicon with vllm-metal"
    if vllm_has_kernels():
        return "vllm", "this vLLM has kernels of its own"
    return "embedded", "this vLLM has no kernels of its own"
