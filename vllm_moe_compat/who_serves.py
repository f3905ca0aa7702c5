"""Which component executes models in this process: ours, another platform plugin or vLLM itself.

The decision reads environment variables, looks for installed packages and for compiled
extensions, and asks the other platform plugins as vLLM does. Where there is none, nothing is
imported. It has no side effects of its own, so vLLM may ask any number of times, also before it
forks.
"""

from __future__ import annotations

import importlib.util
import os

from vllm_moe_compat import envs
from vllm_moe_compat.other_platforms import (
    NAMES,
    OtherPlatform,
    being_asked,
    other_platforms,
    our_platform_allowed,
    plugins_without,
)

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

    The first item is ``"embedded"`` (the MLX platform of this package), the package of another
    platform plugin that is active (``"vllm-metal"``), ``"vllm"`` (its own kernels), or
    ``"nobody"`` if the plugin is switched off or MLX is missing.

    Raises:
        SettingError: a ``VLLM_MOE_COMPAT*`` variable has an invalid value.
    """
    return decide()[:2]


def decide() -> tuple[str, str, str]:
    """Return the component, the reason, and a problem of it.

    The problem is one sentence, empty if there is none: vLLM will refuse two platforms, the
    setting cannot be followed, or another platform plugin failed.

    Raises:
        SettingError: a ``VLLM_MOE_COMPAT*`` variable has an invalid value.
    """
    if envs.ENABLED.read() == "0":
        return "nobody", f"{envs.ENABLED.name}=0 is set", ""
    choice = envs.BACKEND.read()
    if choice == "off":
        return "nobody", f"{envs.BACKEND.name}=off is set", ""
    if not mlx_installed():
        return "nobody", "mlx or mlx-lm is not installed", ""
    others = other_platforms()
    active = [each for each in others if each.answer]
    wanted, allowed = choice == "embedded", our_platform_allowed()
    if wanted and allowed:
        return "embedded", f"{envs.BACKEND.name}=embedded", _second(active) if active else ""
    if being_asked():
        server, reason = "nobody", "another platform plugin has to answer first"
    elif active:
        server = active[0].package
        reason = f"{' and '.join(map(str, active))} {'is' if len(active) == 1 else 'are'} active"
    elif vllm_has_kernels():
        server, reason = "vllm", "this vLLM has kernels of its own"
    elif allowed:
        server, reason = "embedded", "this vLLM has no kernels of its own"
    else:
        server, reason = "nobody", f"VLLM_PLUGINS leaves out {NAMES[1]}"
    reason += "".join(f"; {each} stays out" for each in others if not each.answer + each.error)
    return server, reason, _contradiction(active, server) if wanted else _failures(others, server)


def _second(active: list[OtherPlatform]) -> str:
    """Return what has to be set for the embedded platform to serve instead of active ones."""
    rest = " and ".join(map(str, active))
    return (
        f"{envs.BACKEND.name}=embedded is set and {rest} {'is' if len(active) == 1 else 'are'} "
        "active, where vLLM accepts one platform; set "
        f"VLLM_PLUGINS={plugins_without(active)} for the embedded one, or unset "
        f"{envs.BACKEND.name} for the other."
    )


def _contradiction(active: list[OtherPlatform], server: str) -> str:
    """Return what has to be set for the embedded platform to be asked at all."""
    return (
        f"{envs.BACKEND.name}=embedded is set, but VLLM_PLUGINS leaves out {NAMES[1]}, so {server} "
        f"serves; set VLLM_PLUGINS={plugins_without(active)}."
    )


def _failures(others: list[OtherPlatform], server: str) -> str:
    """Return which plugins of other platforms failed, and who serves now."""
    failed = [f"{each} failed ({each.error})" for each in others if each.error]
    if not failed:
        return ""
    serves = "the embedded MLX platform" if server == "embedded" else server
    return f"{' and '.join(failed)}, so {serves} serves; repair or uninstall it."
