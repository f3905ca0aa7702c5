"""What is installed, and whether the tests have seen it; imports none of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from vllm_moe_compat.tested import TESTED

PACKAGES = ("mlx", "mlx-lm", "vllm", "vllm-metal")
"""What we work with; of vllm-metal the tests have a stand-in only."""
REQUIRED = ("mlx", "mlx-lm")


@dataclass(frozen=True, slots=True)
class PackageStatus:
    """One distribution that the package works with.

    Attributes:
        name: of the distribution.
        version: what is installed; None where it is not.
        tested: the range that the tests have run on; empty where they have not.
        state: ``tested``, ``out of range``, ``never tested`` or ``not installed``.
    """

    name: str
    version: str | None
    tested: str
    state: str

    @property
    def problem(self) -> str:
        """What is wrong and what to do, in one sentence; empty where nothing is."""
        if self.state == "out of range":
            return (
                f"{self.name} {self.version} is installed, where {self.tested} was tested; "
                f"install a version in that range, or see what the probes say of this one."
            )
        if self.version is None and self.name in REQUIRED:
            return f"{self.name} is not installed: the plugin does nothing; install {self.name}."
        return ""

    def __str__(self) -> str:
        beyond = f" (tested: {self.tested})" if self.state == "out of range" else ""
        return f"{self.name} {self.version or 'not installed'}{beyond}"


def packages() -> tuple[PackageStatus, ...]:
    """Return what we work with, read from metadata."""
    return tuple(_package(name) for name in PACKAGES)


def versions() -> dict[str, str]:
    """Return installed distributions → version."""
    return {package.name: package.version for package in packages() if package.version}


def _package(name: str) -> PackageStatus:
    tested = TESTED.get(name, "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return PackageStatus(name, None, tested, "not installed")
    if not tested:
        return PackageStatus(name, version, tested, "never tested")
    return PackageStatus(name, version, tested, judge(version, tested))


def judge(version: str, tested: str) -> str:
    """Return ``tested`` or ``out of range``; a development version of one is the one."""
    from packaging.specifiers import SpecifierSet

    found = SpecifierSet(tested).contains(version, prereleases=True)
    return "tested" if found else "out of range"
