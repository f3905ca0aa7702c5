"""The checks that import neither MLX nor vLLM: Python, settings, packages, plugins."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, entry_points

from vllm_moe_compat import envs, versions
from vllm_moe_compat.commands.doctor.link import BROKEN, OK, SKIPPED, WARNING, Link
from vllm_moe_compat.errors import SettingError
from vllm_moe_compat.other_platforms import (
    GENERAL,
    NAMES,
    PLATFORMS,
    installed_platforms,
    plugins_without,
)
from vllm_moe_compat.who_serves import vllm_has_kernels

ENTRY_POINTS = dict(zip((GENERAL, PLATFORMS), NAMES, strict=True))
OLDEST, NEWEST = (3, 11), (3, 13)


def python() -> Link:
    """Check that Python has a supported version and is native to the machine."""
    title = "Python"
    where = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return Link(
            "python",
            title,
            BROKEN,
            f"it is {where}, where 3.11 to 3.13 was expected",
            "Create an environment with one of these.",
        )
    if platform.system() == "Darwin" and platform.machine() == "x86_64" and _translated():
        return Link(
            "python",
            title,
            BROKEN,
            f"it is {where}, an Intel Python under Rosetta, for which there is no MLX",
            "Install an arm64 Python and create the environment again.",
        )
    return Link("python", title, OK, f"{where}, {sys.executable}")


def _translated() -> bool:
    """Whether macOS runs this process through Rosetta."""
    words = ["sysctl", "-n", "sysctl.proc_translated"]
    answer = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    return answer.stdout.strip() == "1"


def settings() -> Link:
    """Check that the package's environment variables are valid and do not switch it off."""
    for variable in envs.VARIABLES:
        try:
            variable.read()
        except SettingError as error:
            words, _, remedy = str(error).partition("; ")
            return Link("settings", "Settings", BROKEN, words, sentence(remedy))
    if envs.ENABLED.read() == "0":
        return Link(
            "settings",
            "Settings",
            BROKEN,
            f"{envs.ENABLED.name}=0 switches the plugin off",
            f"Unset {envs.ENABLED.name}.",
        )
    if envs.BACKEND.read() == "off" and not _others_serve():
        return Link(
            "settings",
            "Settings",
            BROKEN,
            f"{envs.BACKEND.name}=off, and neither another platform plugin nor a vLLM with kernels "
            "is there to serve instead",
            f"Unset {envs.BACKEND.name}.",
        )
    chosen = [v.name for v in envs.VARIABLES if v.name in os.environ]
    detail = ", ".join(f"{name}={os.environ[name]}" for name in chosen)
    return Link("settings", "Settings", OK, detail or "all have their defaults")


def _others_serve() -> bool:
    installed = importlib.util.find_spec("vllm") is not None
    return bool(installed_platforms()) or not installed or vllm_has_kernels()


def packages() -> Link:
    """Compare the installed versions with the tested ranges."""
    title, found = "Packages", versions.packages()
    detail = ", ".join(f"{p.name} {p.version}" for p in found if p.version) or "none"
    missing = [p.name for p in found if p.name in versions.REQUIRED and p.version is None]
    owner = next((p.chosen_by for p in found if p.chosen_by), "")
    if missing:
        command = f"Install {' and '.join(missing)} in the version that {owner} asks for"
        return Link(
            "packages",
            title,
            BROKEN,
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed in "
            f"{sys.prefix} ({detail})",
            command if owner else "Run: pip install 'vllm-moe-compat[mlx]'",
        )
    odd = [
        f"{p.name} is {p.version}, where {p.tested} was tested"
        for p in found
        if p.state == "out of range"
    ]
    if odd:
        remedy = "If something breaks, install versions within these ranges."
        if owner:
            remedy = f"Keep them, since {owner} chooses them; `vllm-moe-compat status` tries them."
        return Link("packages", title, WARNING, "; ".join(odd), remedy)
    return Link("packages", title, OK, detail)


def vllm() -> Link:
    """Check whether vLLM is installed and has kernels."""
    if importlib.util.find_spec("vllm") is None:
        return Link("vllm", "vLLM", SKIPPED, "vLLM is not installed")
    kernels = vllm_has_kernels()
    words = "has kernels of its own" if kernels else "has no kernels of its own"
    return Link(
        "vllm", "vLLM", OK, f"{versions.versions().get('vllm', 'without metadata')}, {words}"
    )


def entry() -> Link:
    """Check that the entry points of the plugin are registered."""
    title = "Entry points"
    for group, name in ENTRY_POINTS.items():
        if name not in {point.name for point in entry_points(group=group)}:
            return Link(
                "entry-points",
                title,
                BROKEN,
                f"{name} is not registered in {group} of {sys.prefix}, so vLLM does not see the "
                "plugin",
                "Install the package with pip into the environment that vLLM runs in.",
            )
    return Link("entry-points", title, OK, " and ".join(ENTRY_POINTS.values()))


def allowed() -> Link:
    """Check that ``VLLM_PLUGINS`` does not exclude the plugin."""
    title, value = "VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS")
    if value is None:
        return Link("vllm-plugins", title, OK, "unset: every plugin is loaded")
    hidden = [name for name in ENTRY_POINTS.values() if name not in value.split(",")]
    if hidden:
        return Link(
            "vllm-plugins",
            title,
            BROKEN,
            f"it is {value!r}, which excludes {' and '.join(hidden)}",
            f"Set VLLM_PLUGINS={plugins_without(())}, or unset it.",
        )
    return Link("vllm-plugins", title, OK, f"{value} includes the plugin")


def wanted_gpu() -> str:
    """Return the GPU that the installed MLX is built for; empty for the CPU."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Metal's"
    for name in ("mlx-cuda-12", "mlx-cuda-13", "mlx-cuda"):
        if installed(name):
            return f"a CUDA device, since {name} is installed,"
    return ""


def installed(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def sentence(words: str) -> str:
    """Return the text with a capital first letter."""
    return words[:1].upper() + words[1:]
