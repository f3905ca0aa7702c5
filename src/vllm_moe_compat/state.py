"""What ``status()`` returns: plain data, readable when printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from vllm_moe_compat.report import LoadReport

_PACKAGES = ("mlx", "mlx-lm", "vllm", "vllm-metal")


@dataclass(frozen=True, slots=True)
class RowStatus:
    """One mapped module.

    Attributes:
        module: its import path.
        class_name: the class whose ``sanitize`` is wrapped.
        state: active; waiting (not imported yet); unpatchable; displaced (another
            library took ours out, the next load puts it back); reverted; dormant
            (never applied); off (switched off by the environment).
        reason: why it is unpatchable, else empty.
    """

    module: str
    class_name: str
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class HookStatus:
    """One function that calls pass through, and in which state; see ``RowStatus``."""

    name: str
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """What is patched in this process.

    Attributes:
        rows: every mapped module.
        hooks: the functions that are wrapped now.
        versions: installed distributions → version.
        load: what the last load did, or None before the first.
    """

    rows: tuple[RowStatus, ...]
    hooks: tuple[HookStatus, ...]
    versions: Mapping[str, str]
    load: LoadReport | None = None

    def __str__(self) -> str:
        installed = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"vllm_moe_compat with {installed or 'no mlx'}"]
        lines += [f"  hook {hook.name}" for hook in self.hooks] or ["  no hook is installed"]
        for row in self.rows:
            reason = f": {row.reason}" if row.reason else ""
            lines.append(f"  {row.module}: {row.state}{reason}")
        if self.load is not None:
            lines.append(f"  last load: {self.load}")
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of what we work with, read from metadata, importing nothing."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
