"""The component that executes models, by settings and by installed packages.

``test_platform_plugins.py`` has the answers of the real vLLM beside other plugins.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from support.distributions import distribution
from vllm_moe_compat import envs, plugin
from vllm_moe_compat.errors import SettingError
from vllm_moe_compat.who_serves import decide, who_serves


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in envs.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``install(package, *files)``: a package that is found before the real one."""

    def put(package: str, *files: str) -> None:
        (tmp_path / package).mkdir()
        for file in ("__init__.py", *files):
            (tmp_path / package / file).touch()
        # An imported module would be found first.
        monkeypatch.delitem(sys.modules, package, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    return put


def check(server: str, *words: str) -> None:
    found, reason = who_serves()
    assert found == server, reason
    assert all(word in reason for word in words), reason
    assert plugin.platform() == (plugin.PLATFORM_CLASS if server == "embedded" else None)


def test_the_plugin_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT", "0")
    monkeypatch.setenv("VLLM_MOE_COMPAT_BACKEND", "embedded")
    check("nobody", "VLLM_MOE_COMPAT=0")


def test_the_backend_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_BACKEND", "off")
    check("nobody", "VLLM_MOE_COMPAT_BACKEND=off")


@pytest.mark.parametrize("missing", ["mlx", "mlx_lm"])
@pytest.mark.parametrize("choice", ["auto", "embedded"])
def test_without_mlx(missing: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("VLLM_MOE_COMPAT_BACKEND", choice)
    check("nobody", "not installed")


def test_another_active_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    active(tmp_path, monkeypatch, "vllm-metal")
    check("vllm-metal", "the platform plugin 'apple' of vllm-metal is active")


def test_a_package_without_an_entry_point_is_no_platform(install: Any) -> None:
    install("vllm_metal")
    install("vllm")
    check("embedded", "no kernels")


def test_another_active_platform_goes_before_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Any
) -> None:
    active(tmp_path, monkeypatch, "vllm-metal")
    install("vllm", "_C.abi3.so")
    check("vllm-metal")
    monkeypatch.setenv("VLLM_PLUGINS", "moe_compat")
    check("vllm", "kernels of its own")


def test_the_embedded_setting_goes_before_kernels_and_names_the_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Any
) -> None:
    install("vllm", "_C.abi3.so")
    monkeypatch.setenv("VLLM_MOE_COMPAT_BACKEND", "embedded")
    assert decide() == ("embedded", "VLLM_MOE_COMPAT_BACKEND=embedded", "")
    active(tmp_path, monkeypatch, "vllm-metal")
    check("embedded", "VLLM_MOE_COMPAT_BACKEND=embedded")
    assert "'apple' of vllm-metal is active, where vLLM accepts one platform" in decide()[2]


def active(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Install a distribution whose platform plugin is active."""
    module = name.replace("-", "_") + "_active"
    text = "def register():\n    return 'somewhere.Platform'\n"
    entry = f"apple = {module}:register"
    distribution(folder / "active", name, module, text, platform_plugins=entry)
    monkeypatch.syspath_prepend(folder / "active")


@pytest.mark.parametrize(
    "file", ["_C.abi3.so", "_C_AVX512.abi3.so", "_C_stable_libtorch.abi3.so", "_rocm_C.abi3.so"]
)
def test_vllm_with_kernels_of_its_own(file: str, install: Any) -> None:
    install("vllm", file)
    check("vllm", "kernels of its own")


@pytest.mark.parametrize("file", ["_custom_ops.py", "_C.py", "spinloop.abi3.so"])
def test_vllm_without_kernels(file: str, install: Any) -> None:
    install("vllm", file)
    check("embedded", "no kernels")


@pytest.mark.skipif(
    sys.platform == "darwin", reason="there, vllm-metal's environment decides who serves"
)
def test_the_embedded_platform_serves_in_this_environment() -> None:
    """The environment of ``scripts/install``: the real vLLM, built without kernels."""
    check("embedded", "no kernels")


@pytest.mark.parametrize("name", ["VLLM_MOE_COMPAT", "VLLM_MOE_COMPAT_BACKEND"])
def test_an_invalid_setting_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "nonsense")
    for function in (who_serves, plugin.platform):
        words = f"{name}='nonsense' is not a valid value; set it to one"
        with pytest.raises(SettingError, match=words):
            function()
