"""What vLLM finds through the entry points: who serves, what is loaded, what is said."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform as host
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_moe_compat import envs, plugin
from vllm_moe_compat.errors import SettingError
from vllm_moe_compat.who_serves import who_serves

HEAVY = ("vllm", "mlx", "mlx_lm", "torch", "transformers", "safetensors", "numpy", "wrapt")
LOADED = f"""
import sys
def loaded(*names):
    return sorted({{m.partition(".")[0] for m in sys.modules}} & set(names or {HEAVY!r}))
"""


def fresh(
    code: str, *options: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, with none of our variables but ``env``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return subprocess.run(
        [sys.executable, *options, "-c", LOADED + code],
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def answer(result: subprocess.CompletedProcess[str]) -> Any:
    """What the code printed last, as JSON."""
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# --- who serves --------------------------------------------------------------


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
        # What is imported already answers first, so it is set aside.
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


def test_switched_off_nobody_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_embedded_wins_over_everything_that_is_there(
    monkeypatch: pytest.MonkeyPatch, install: Any
) -> None:
    install("vllm_metal")
    install("vllm", "_C.abi3.so")
    apple_silicon(monkeypatch)
    monkeypatch.setenv("VLLM_MOE_COMPAT_BACKEND", "embedded")
    check("embedded", "VLLM_MOE_COMPAT_BACKEND=embedded")


def test_vllm_metal_counts_on_apple_silicon_alone(
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
def test_here_it_is_us() -> None:
    """The environment of ``scripts/install``: the real vLLM, built without kernels."""
    check("embedded", "no kernels")


@pytest.mark.parametrize("name", ["VLLM_MOE_COMPAT", "VLLM_MOE_COMPAT_BACKEND"])
def test_a_setting_that_means_nothing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "nonsense")
    for function in (who_serves, plugin.platform):
        with pytest.raises(SettingError, match=f"{name}='nonsense' is not a valid value; set"):
            function()


# --- what is loaded ----------------------------------------------------------


def test_importing_and_choosing_the_platform_load_nothing() -> None:
    result = fresh(
        "import json, vllm_moe_compat; first = loaded()\n"
        "from vllm_moe_compat import plugin; second = plugin.platform()\n"
        "print(json.dumps([first, second, loaded()]))",
        env={"VLLM_MOE_COMPAT_BACKEND": "embedded"},
    )
    assert answer(result) == [[], plugin.PLATFORM_CLASS, []]


def test_registering_where_another_serves_adds_little_to_vllm() -> None:
    """``vllm`` is there anyway when it calls us; none of our backend comes with it."""
    result = fresh(
        "import json, vllm.envs; before = set(sys.modules)\n"
        "from vllm_moe_compat import plugin; plugin.register()\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "backend = [m for m in sys.modules if m.startswith('vllm_moe_compat.backend')]\n"
        "print(json.dumps([sorted(new & set(loaded())), backend]))",
        env={"VLLM_MOE_COMPAT_BACKEND": "off"},
    )
    assert answer(result) == [["wrapt"], []]


@pytest.fixture(scope="module")
def without_mlx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A search path with everything that is installed here except MLX and what uses it."""
    folder = tmp_path_factory.mktemp("site")
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    for entry in Path(vllm.origin).parent.parent.iterdir():
        if not entry.name.startswith(("mlx", "__pycache__")):
            (folder / entry.name).symlink_to(entry)
    source = Path(plugin.__file__).parent.parent
    return os.pathsep.join([str(source), str(folder)])


@pytest.mark.parametrize("choice", ["auto", "embedded"])
def test_without_mlx_nothing_happens(choice: str, without_mlx: str) -> None:
    result = fresh(
        "import json, importlib.util\n"
        "there = [n for n in ('mlx', 'mlx_lm', 'vllm') if importlib.util.find_spec(n)]\n"
        "from vllm_moe_compat import plugin\n"
        "ends = [plugin.platform(), plugin.register(), plugin.platform()]\n"
        "print(json.dumps([there, ends, loaded()]))",
        "-S",
        env={"PYTHONPATH": without_mlx, "VLLM_MOE_COMPAT_BACKEND": choice},
    )
    assert answer(result) == [["vllm"], [None] * 3, []]
    assert "moe_compat" not in result.stdout + result.stderr


def test_switched_off_registering_does_nothing() -> None:
    result = fresh(
        "import json; from vllm_moe_compat import plugin\n"
        "print(json.dumps([plugin.register(), plugin.platform(), loaded()]))",
        env={"VLLM_MOE_COMPAT": "0"},
    )
    assert answer(result) == [None, None, []]


# --- beside the real vLLM ----------------------------------------------------


def test_the_entry_points_are_declared_and_lead_here() -> None:
    for group, name, function in (
        ("vllm.general_plugins", "moe_compat", plugin.register),
        ("vllm.platform_plugins", "moe_compat_mlx", plugin.platform),
    ):
        (point,) = importlib.metadata.entry_points(group=group, name=name)
        assert point.dist is not None
        assert point.dist.name == "vllm-moe-compat"
        assert point.load() is function


STARTED = """
import json, logging
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
# vLLM configures logging after it has loaded its plugins; 0.27 when it is imported.
import vllm.logger
if hasattr(vllm.logger, "configure_logging"):
    from vllm.config.logging import LoggingConfig
    vllm.logger.configure_logging(LoggingConfig())

import vllm.envs
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models import ModelRegistry
from vllm_moe_compat import plugin, status
from vllm_moe_compat.envs import VARIABLES
from vllm_moe_compat.load import patching
from vllm_moe_compat.log import logger

def effects():
    ours = logger.logger
    return [
        sorted((str(k), id(p), id(p.wrapper)) for k, p in patching._PATCHES.items()),
        sorted(patching._HOOKED),
        sorted(ModelRegistry.get_supported_archs()),
        sorted(vllm.envs.environment_variables),
        [id(h) for h in (*ours.handlers, *ours.filters)],
        [id(h) for h in logging.getLogger("vllm").handlers],
        str(status()),
    ]

before = effects()
plugin.register()
logger.info("a line of %s", "ours")
logger.debug("not at this level")
# A function of vllm.envs before it became the platform's.
(current_platform.validate_environ or vllm.envs.validate_environ)(hard_fail=True)
print()
print(json.dumps({
    "platform": f"{type(current_platform).__module__}.{type(current_platform).__name__}",
    "mlx": loaded("mlx", "mlx_lm"),
    "same": before == effects(),
    "unknown": [v.name for v in VARIABLES if v.name not in vllm.envs.environment_variables],
    "values": [vllm.envs.VLLM_MOE_COMPAT_BACKEND, vllm.envs.VLLM_MOE_COMPAT_DTYPE],
    "quantization": [get_quantization_config(n).__module__ for n in ("fp8", "mlx")],
    "model": ModelRegistry.models["Qwen3_5MoeForConditionalGeneration"].load_model_cls().__module__,
}))
"""


@pytest.fixture(scope="module")
def started() -> tuple[dict[str, Any], str]:
    """A process in which the real vLLM loaded its plugins: findings and its output."""
    settings = {variable.name: variable.default for variable in envs.VARIABLES}
    result = fresh(STARTED, env=settings | {"VLLM_MOE_COMPAT_BACKEND": "embedded"})
    return answer(result), result.stdout + result.stderr


def test_vllm_takes_our_platform_and_no_mlx_is_loaded(started: Any) -> None:
    found, output = started
    assert found["platform"] == plugin.PLATFORM_CLASS
    assert found["mlx"] == []
    assert "ERROR" not in output


def test_a_second_call_has_no_further_effect(started: Any) -> None:
    assert started[0]["same"]


def test_vllm_knows_our_variables(started: Any) -> None:
    found, output = started
    assert found["unknown"] == []
    assert found["values"] == ["embedded", "auto"]
    assert "Unknown vLLM environment variable" not in output


def test_vllm_finds_our_stand_ins(started: Any) -> None:
    found, _ = started
    assert found["model"] == "vllm_moe_compat.backend.vllm.model_stubs"
    assert found["quantization"] == ["vllm_moe_compat.backend.vllm.model_stubs"] * 2


def test_log_lines_reach_vllms_handlers_once(started: Any) -> None:
    _, output = started
    (line,) = [line for line in output.splitlines() if "a line of ours" in line]
    assert line.partition("INFO ")[2].endswith("moe_compat: a line of ours")
    assert "not at this level" not in output


def test_outside_vllm_log_lines_are_the_applications_business() -> None:
    result = fresh(
        "from vllm_moe_compat.log import logger; logger.info('quiet')\n"
        "import logging; logging.basicConfig(level=logging.INFO); logger.info('spoken')"
    )
    assert result.returncode == 0
    assert result.stdout + result.stderr == "INFO:vllm_moe_compat:moe_compat: spoken\n"


def test_vllm_swallows_a_bad_setting_so_we_log_it() -> None:
    result = fresh(
        "import json\n"
        "from vllm.platforms import current_platform\n"
        "print()\n"
        "print(json.dumps(type(current_platform).__name__))",
        env={"VLLM_MOE_COMPAT_BACKEND": "nonsense"},
    )
    assert answer(result) != "MlxPlatform"
    words = "moe_compat: VLLM_MOE_COMPAT_BACKEND='nonsense' is not a valid value; set it to one of"
    assert words in result.stdout + result.stderr


def test_a_bad_setting_ends_the_start_with_its_own_words() -> None:
    result = fresh(
        "from vllm.plugins import load_general_plugins; load_general_plugins()",
        env={"VLLM_MOE_COMPAT_BACKEND": "nonsense"},
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(
        "vllm_moe_compat.errors.SettingError: VLLM_MOE_COMPAT_BACKEND='nonsense'"
    )


# --- documents ---------------------------------------------------------------


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda variable: variable.name)
def test_the_environment_page_has_every_variable_its_default_and_its_choices(
    variable: Any,
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "environment.md").read_text(encoding="utf-8")
    (row,) = [x for x in page.splitlines() if x.startswith(f"| `{variable.name}` |")]
    assert row.split(" | ")[2].strip("`") == (variable.default or "unset")
    assert all(f"`{choice}`" in row for choice in variable.choices)
