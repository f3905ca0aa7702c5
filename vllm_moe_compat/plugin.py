"""vLLM's entry points: ``register`` and ``platform``.

``register`` (group ``vllm.general_plugins``) installs the load hooks and, where the embedded
platform serves, registers its model classes. ``platform`` (group ``vllm.platform_plugins``)
names the platform class.

vLLM calls both functions several times in each of its processes, before any model is loaded,
and forks some of those processes afterwards. So neither function imports mlx or mlx-lm or
evaluates an array, and a second call changes nothing. Where mlx is missing both return at once:
beside a CUDA build of vLLM the plugin costs nothing.
"""

from __future__ import annotations

import sys

from vllm_moe_compat import envs
from vllm_moe_compat.log import logger, speak_through_vllm
from vllm_moe_compat.who_serves import decide, mlx_installed

PLATFORM_CLASS = "vllm_moe_compat.backend.vllm.platform.MlxPlatform"


def platform() -> str | None:
    """Entry point ``vllm.platform_plugins``: return our platform class, or None.

    vLLM swallows exceptions raised here and silently selects another platform, so an invalid
    setting is logged before it is raised. Nor does it say what to do about a second platform, or
    that one failed.
    """
    try:
        server, _, problem = decide()
    except ValueError as error:
        speak_through_vllm()
        logger.error("%s", error)
        raise
    _say(problem)
    return PLATFORM_CLASS if server == "embedded" else None


def register() -> None:
    """Entry point ``vllm.general_plugins``: install the hooks; idempotent.

    Raises:
        SettingError: a ``VLLM_MOE_COMPAT*`` variable has an invalid value; no hook is installed.
    """
    _declare_variables_to_vllm()
    server, reason, problem = decide()
    if envs.ENABLED.read() == "0" or not mlx_installed():
        return
    speak_through_vllm()
    _say(problem)

    from vllm_moe_compat.load import patching

    patching.apply()
    if server == "embedded":
        from vllm_moe_compat.backend.vllm import model_stubs

        model_stubs.register()
    else:
        logger.info(
            "%s; our load hooks are installed",
            f"{server} serves, since {reason}" if server != "nobody" else reason,
        )


_said: set[str] = set()


def _say(problem: str) -> None:
    """Log a problem, once in a process."""
    if problem and problem not in _said:
        _said.add(problem)
        speak_through_vllm()
        logger.warning("%s", problem)


def _declare_variables_to_vllm() -> None:
    """Add the ``VLLM_MOE_COMPAT*`` variables to those that vLLM knows.

    vLLM warns of unknown ``VLLM_*`` variables and rejects them in strict mode. ``vllm.envs`` is
    not imported for this: when vLLM calls a plugin, it is loaded already.
    """
    vllm_envs = sys.modules.get("vllm.envs")
    if vllm_envs is None:
        return
    for variable in envs.VARIABLES:
        vllm_envs.environment_variables.setdefault(variable.name, variable.read)
