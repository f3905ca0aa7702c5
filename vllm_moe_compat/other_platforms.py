"""The platform plugins that are installed beside ours, and whether vLLM would activate them.

vLLM calls the function of every entry point in ``vllm.platform_plugins`` that ``VLLM_PLUGINS``
allows, takes the plugin that answers with a class, ignores one that raises, and refuses to start
with two. Whether a plugin is active can only be learned in the same way, so its function is
called here as vLLM calls it. Nothing is decided by a plugin's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

PLATFORMS, GENERAL = "vllm.platform_plugins", "vllm.general_plugins"
# vLLM filters these by VLLM_PLUGINS, too; endpoint plugins only load if they are named.
_FILTERED = (GENERAL, PLATFORMS, "vllm.io_processor_plugins", "vllm.stat_logger_plugins")
_OURS = "vllm_moe_compat.plugin"
NAMES = ("moe_compat", "moe_compat_mlx")
"""The entry points of this package: general and platform."""

_asking: ContextVar[bool] = ContextVar("vllm_moe_compat_asking", default=False)


@dataclass(frozen=True, slots=True)
class OtherPlatform:
    """A platform plugin of another package that ``VLLM_PLUGINS`` allows.

    Attributes:
        name: of the entry point.
        package: name of the distribution, or the module if there is none.
        answer: the platform class that it names; empty if it stays out, or fails.
        error: why it could not be asked; empty if it could.
    """

    name: str
    package: str
    answer: str = ""
    error: str = ""

    def __str__(self) -> str:
        return f"the platform plugin {self.name!r} of {self.package}"


def allowed_plugins() -> list[str] | None:
    """Return the names that ``VLLM_PLUGINS`` allows, as vLLM reads it; None for all."""
    value = os.environ.get("VLLM_PLUGINS")
    return None if value is None else value.split(",")


def our_platform_allowed() -> bool:
    """Whether vLLM would ask our platform plugin; also where the package is not installed."""
    allowed = allowed_plugins()
    return allowed is None or NAMES[1] in allowed


def installed_platforms() -> list[EntryPoint]:
    """Return every other platform plugin that ``VLLM_PLUGINS`` allows, without importing it."""
    allowed = allowed_plugins()
    # A later entry of the same name takes the place of an earlier one, as in vLLM.
    found = {point.name: point for point in _others(PLATFORMS)}
    return [point for name, point in found.items() if allowed is None or name in allowed]


def being_asked() -> bool:
    """Whether another plugin, which is being asked here, asks back."""
    return _asking.get()


def other_platforms() -> list[OtherPlatform]:
    """Ask every other platform plugin that ``VLLM_PLUGINS`` allows; none while one asks back."""
    if being_asked():
        return []
    token = _asking.set(True)
    try:
        return [_ask(point) for point in installed_platforms()]
    finally:
        _asking.reset(token)


def plugins_without(unwanted: Iterable[OtherPlatform]) -> str:
    """Return the value of ``VLLM_PLUGINS`` that loads what is loaded now, but for some packages.

    Args:
        unwanted: the plugins to leave out, with everything else of their packages.
    """
    unwanted = list(unwanted)
    names, packages = {each.name for each in unwanted}, {each.package for each in unwanted}
    allowed = allowed_plugins()
    if allowed is None:
        points = [point for group in _FILTERED for point in _others(group)]
        allowed = sorted(point.name for point in points if _package(point) not in packages)
    kept = [name for name in allowed if name and name not in (*names, *NAMES)]
    return ",".join([*NAMES, *dict.fromkeys(kept)])


def _others(group: str) -> list[EntryPoint]:
    return [point for point in entry_points(group=group) if point.module != _OURS]


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]


def _ask(point: EntryPoint) -> OtherPlatform:
    try:
        answer = point.load()()
    except Exception as error:  # noqa: BLE001 - vLLM goes on after any
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return OtherPlatform(point.name, _package(point), error=words)
    return OtherPlatform(point.name, _package(point), "" if answer is None else str(answer))
