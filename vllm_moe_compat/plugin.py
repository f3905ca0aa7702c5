"""The two functions that vLLM finds through entry points.

``register`` (group ``vllm.general_plugins``) installs the compatibility hooks
and, where the embedded platform serves, tells vLLM about its models.
``platform`` (group ``vllm.platform_plugins``) answers who serves.

vLLM calls both several times in each of its processes, before any model is
loaded, and forks some of those processes: so neither imports mlx or mlx-lm,
evaluates anything, or has an effect that a second call would repeat. Where mlx
is missing both return at once, and the plugin costs nothing beside a CUDA vLLM.
"""

from __future__ import annotations

import importlib.util
import os
import platform as host
import sys

from vllm_moe_compat import envs
from vllm_moe_compat.log import logger, speak_through_vllm

PLATFORM_CLASS = "vllm_moe_compat.backend.vllm.platform.MlxPlatform"
KERNEL_PACKAGES = ("vllm_xpu_kernels", "tpu_inference", "libtpu")


def mlx_installed() -> bool:
    """Whether mlx and mlx-lm can be imported, found out without doing so."""
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


def vllm_has_kernels() -> bool:
    """Whether the installed vLLM has kernels for some device.

    CPU, CUDA and ROCm builds ship compiled extensions; XPU and TPU bring theirs
    in packages of their own; the ``empty`` build has none of them. Its version
    says nothing: an installer may have set it.
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
    """Return who executes models here, and the reason.

    The first item is ``"embedded"`` (our MLX platform), ``"vllm-metal"``,
    ``"vllm"`` (its own kernels) or ``"nobody"`` (we stay out for another reason).

    Raises:
        SettingError: a ``VLLM_MOE_COMPAT*`` variable has a value that means nothing.
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


def platform() -> str | None:
    """Entry point ``vllm.platform_plugins``: our platform class, or None.

    vLLM swallows exceptions here and would fall back to another platform
    without a word, so a bad setting is logged before it is raised.
    """
    try:
        server, _ = who_serves()
    except ValueError as error:
        speak_through_vllm()
        logger.error("%s", error)
        raise
    return PLATFORM_CLASS if server == "embedded" else None


def register() -> None:
    """Entry point ``vllm.general_plugins``: install the hooks; idempotent.

    Raises:
        SettingError: a ``VLLM_MOE_COMPAT*`` variable has a value that means
            nothing; no hook is installed then.
    """
    _name_our_variables()
    server, reason = who_serves()
    if envs.ENABLED.read() == "0" or not mlx_installed():
        return
    speak_through_vllm()

    from vllm_moe_compat.load import patching

    patching.apply()
    if server == "embedded":
        from vllm_moe_compat.backend.vllm import model_stubs as models

        models.register()
    else:
        logger.info(
            "%s; our load hooks are installed",
            f"{server} serves, since {reason}" if server != "nobody" else f"{reason} is set",
        )


def _name_our_variables() -> None:
    """Tell vLLM which ``VLLM_MOE_COMPAT*`` variables are ours.

    It warns of unknown ``VLLM_*`` variables, and refuses them in strict mode.
    Nothing is imported for that: whoever calls a plugin has loaded them.
    """
    known = sys.modules.get("vllm.envs")
    if known is None:
        return
    for variable in envs.VARIABLES:
        known.environment_variables.setdefault(variable.name, variable.read)
