"""The component that executes models, by settings and by installed packages."""

from __future__ import annotations

import platform as host
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_moe_compat import envs, plugin
from vllm_moe_compat.errors import SettingError
from vllm_moe_compat.who_serves import who_serves


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in envs.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


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


def apple_silicon(monkeypatch: pytest.MonkeyPatch, machine: str = "arm64") -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(host, "machine", lambda: machine)


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


def test_apple_silicon_with_vllm_metal(monkeypatch: pytest.MonkeyPatch, install: Any) -> None:
    install("vllm_metal")
    apple_silicon(monkeypatch)
    check("vllm-metal", "vllm-metal")


def test_the_embedded_setting_overrides_vllm_metal_and_kernels(
    monkeypatch: pytest.MonkeyPatch, install: Any
) -> None:
    install("vllm_metal")
    install("vllm", "_C.abi3.so")
    apple_silicon(monkeypatch)
    monkeypatch.setenv("VLLM_MOE_COMPAT_BACKEND", "embedded")
    check("embedded", "VLLM_MOE_COMPAT_BACKEND=embedded")


def test_vllm_metal_counts_only_on_apple_silicon(
    monkeypatch: pytest.MonkeyPatch, install: Any
) -> None:
    install("vllm_metal")
    install("vllm")
    check("embedded")
    apple_silicon(monkeypatch, "x86_64")
    check("embedded")


def test_apple_silicon_without_vllm_metal(monkeypatch: pytest.MonkeyPatch, install: Any) -> None:
    install("vllm")
    apple_silicon(monkeypatch)
    check("embedded", "no kernels")


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
