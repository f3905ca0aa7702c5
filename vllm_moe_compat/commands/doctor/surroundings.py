"""What can be seen without importing MLX or vLLM: Python, settings, packages, plugins."""

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
from vllm_moe_compat.who_serves import vllm_has_kernels

OURS = {"vllm.general_plugins": "moe_compat", "vllm.platform_plugins": "moe_compat_mlx"}
OLDEST, NEWEST = (3, 11), (3, 13)


def python() -> Link:
    """A Python of a version that we run on, and native to the machine."""
    title = "Python"
    where = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return Link(
            "python",
            title,
            BROKEN,
            f"it is {where}, where 3.11 to 3.13 was expected",
            "Make an environment with one of these.",
        )
    if platform.system() == "Darwin" and platform.machine() == "x86_64" and _translated():
        return Link(
            "python",
            title,
            BROKEN,
            f"it is {where}, an Intel Python that Rosetta translates, for which there is no MLX",
            "Install a Python for arm64 and make the environment anew with it.",
        )
    return Link("python", title, OK, f"{where}, {sys.executable}")


def _translated() -> bool:
    """Whether macOS runs this process through Rosetta."""
    words = ["sysctl", "-n", "sysctl.proc_translated"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    return asked.stdout.strip() == "1"


def settings() -> Link:
    """Our environment variables mean something, and do not switch us off."""
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
            f"{envs.ENABLED.name}=0 switches the whole plugin off",
            f"Unset {envs.ENABLED.name}.",
        )
    if envs.BACKEND.read() == "off" and not _others_serve():
        return Link(
            "settings",
            "Settings",
            BROKEN,
            f"{envs.BACKEND.name}=off, and neither vllm-metal nor a vLLM with kernels is here to "
            "serve instead",
            f"Unset {envs.BACKEND.name}.",
        )
    chosen = [v.name for v in envs.VARIABLES if v.name in os.environ]
    said = ", ".join(f"{name}={os.environ[name]}" for name in chosen)
    return Link("settings", "Settings", OK, said or "all are at their defaults")


def _others_serve() -> bool:
    installed = importlib.util.find_spec("vllm") is not None
    metal = importlib.util.find_spec("vllm_metal") is not None
    return metal or not installed or vllm_has_kernels()


def packages() -> Link:
    """What is installed, against what the tests ran on."""
    title, found = "Packages", versions.packages()
    said = ", ".join(f"{p.name} {p.version}" for p in found if p.version) or "none of ours"
    missing = [p.name for p in found if p.name in versions.REQUIRED and p.version is None]
    if missing:
        return Link(
            "packages",
            title,
            BROKEN,
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed in "
            f"{sys.prefix} ({said})",
            "Run: pip install 'vllm-moe-compat[mlx]'",
        )
    odd = [
        f"{p.name} is {p.version}, where {p.tested} was tested"
        for p in found
        if p.state == "out of range"
    ]
    if odd:
        remedy = "If something breaks, install versions within these ranges."
        return Link("packages", title, WARNING, "; ".join(odd), remedy)
    return Link("packages", title, OK, said)


def vllm() -> Link:
    """Whether there is a vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return Link("vllm", "vLLM", SKIPPED, "vLLM is not installed")
    kernels = vllm_has_kernels()
    words = "has kernels of its own" if kernels else "has no kernels of its own"
    return Link(
        "vllm", "vLLM", OK, f"{versions.versions().get('vllm', 'without metadata')}, {words}"
    )


def entry() -> Link:
    """Whether our plugins are registered where vLLM looks."""
    title = "Entry points"
    for group, name in OURS.items():
        if name not in {point.name for point in entry_points(group=group)}:
            return Link(
                "entry-points",
                title,
                BROKEN,
                f"{name} is not registered in {group} of {sys.prefix}, so vLLM does not see the "
                "plugin",
                "Install the package with pip into the environment that vLLM runs in.",
            )
    return Link("entry-points", title, OK, " and ".join(OURS.values()))


def allowed() -> Link:
    """Whether ``VLLM_PLUGINS`` lets ours pass."""
    title, value = "VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS")
    if value is None:
        return Link("vllm-plugins", title, OK, "unset, so every plugin is loaded")
    hidden = [name for name in OURS.values() if name not in value.split(",")]
    if hidden:
        wanted = ",".join([*filter(None, value.split(",")), *hidden])
        return Link(
            "vllm-plugins",
            title,
            BROKEN,
            f"it is {value!r}, which hides {' and '.join(hidden)} from vLLM",
            f"Set VLLM_PLUGINS={wanted}, or unset it.",
        )
    return Link("vllm-plugins", title, OK, f"{value} includes ours")


def wanted_gpu() -> str:
    """Return which GPU this machine's MLX is for; empty where it is the CPU."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Metal's"
    for name in ("mlx-cuda-12", "mlx-cuda-13", "mlx-cuda"):
        if installed(name):
            return f"a CUDA device, since {name} is installed,"
    return ""


def installed(name: str) -> bool:
    """Whether there is a distribution of that name."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def sentence(words: str) -> str:
    """Begin with a capital letter."""
    return words[:1].upper() + words[1:]
