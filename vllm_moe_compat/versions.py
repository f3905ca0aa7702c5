"""Installed versions of the packages around us, and the ranges that the tests cover.

Versions come from distribution metadata; no package is imported. A version outside its range is
not refused: ``status``, ``doctor`` and the embedded backend report it. Where vllm-metal is
installed, it chooses the versions, and has operations compiled for one of MLX: no other is advised.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

TESTED = {
    "mlx": ">=0.32,<0.33",
    "mlx-lm": ">=0.31.3,<0.33",
    "transformers": ">=5.12.1,<5.20",
    "vllm": ">=0.27.1,<0.33",
}
"""Distribution name → tested range, as a specifier set of ``packaging.specifiers``."""
METAL = "vllm-metal"
PACKAGES = ("mlx", "mlx-lm", "transformers", "vllm", METAL)
"""Packages that we work with; the tests replace vllm-metal by a stand-in."""
REQUIRED = ("mlx", "mlx-lm")


@dataclass(frozen=True, slots=True)
class PackageStatus:
    """One distribution that the package works with.

    Attributes:
        name: distribution name.
        version: installed version; None if it is not installed.
        tested: tested range; empty if there is none.
        state: ``tested``, ``out of range``, ``never tested`` or ``not installed``.
        chosen_by: name of the installed distribution that chooses the version; empty for none.
    """

    name: str
    version: str | None
    tested: str
    state: str
    chosen_by: str = ""

    @property
    def problem(self) -> str:
        """The problem and its remedy in one sentence; empty if there is none."""
        if self.state == "out of range":
            remedy = "install a version in that range, or check the probes of `status` for this one"
            if self.chosen_by:
                remedy = (
                    f"keep it, since {self.chosen_by} chooses it, and check the probes of `status`"
                )
            installed = f"{self.name} {self.version} is installed"
            return f"{installed}, where {self.tested} was tested; {remedy}."
        if self.version is None and self.name in REQUIRED:
            which = f"the {self.name} that {self.chosen_by} asks for"
            which = which if self.chosen_by else self.name
            return f"{self.name} is not installed: the plugin does nothing; install {which}."
        return ""

    def __str__(self) -> str:
        outside = f" (tested: {self.tested})" if self.state == "out of range" else ""
        return f"{self.name} {self.version or 'not installed'}{outside}"


def packages() -> tuple[PackageStatus, ...]:
    """Return the status of every distribution in ``PACKAGES``."""
    return tuple(_package(name) for name in PACKAGES)


def versions() -> dict[str, str]:
    """Return distribution name → version of those that are installed."""
    return {package.name: package.version for package in packages() if package.version}


def _package(name: str) -> PackageStatus:
    tested, version = TESTED.get(name, ""), _installed(name)
    chosen_by = METAL if name != METAL and _installed(METAL) is not None else ""
    if version is None:
        return PackageStatus(name, None, tested, "not installed", chosen_by)
    if not tested:
        return PackageStatus(name, version, tested, "never tested", chosen_by)
    return PackageStatus(name, version, tested, judge(version, tested), chosen_by)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def judge(version: str, tested: str) -> str:
    """Return ``tested`` or ``out of range``; development versions count like releases."""
    from packaging.specifiers import SpecifierSet

    found = SpecifierSet(tested).contains(version, prereleases=True)
    return "tested" if found else "out of range"
