"""The entry points: modules they load, effects inside the real vLLM, and log lines."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_moe_compat import envs, plugin

HEAVY = ("vllm", "mlx", "mlx_lm", "torch", "transformers", "safetensors", "numpy", "wrapt")
LOADED = f"""
import sys
def loaded(*names):
    return sorted({{m.partition(".")[0] for m in sys.modules}} & set(names or {HEAVY!r}))
"""


def fresh(
    code: str, *options: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter; of the ``VLLM_*`` variables it gets only ``env``."""
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
    """The last line that the code printed, as JSON."""
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# --- modules that are loaded ----------------------------------------------------------


def test_importing_and_choosing_the_platform_load_nothing() -> None:
    result = fresh(
        "import json, vllm_moe_compat; first = loaded()\n"
        "from vllm_moe_compat import plugin; second = plugin.platform()\n"
        "print(json.dumps([first, second, loaded()]))",
        env={"VLLM_MOE_COMPAT_BACKEND": "embedded"},
    )
    assert answer(result) == [[], plugin.PLATFORM_CLASS, []]


def test_registering_beside_another_platform_loads_no_backend() -> None:
    """vLLM is loaded already when it calls the plugin; only wrapt is added."""
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
    """A search path with all installed packages except MLX and mlx-lm."""
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


def test_the_entry_points_are_declared() -> None:
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
        sorted(
            (str(key), id(patch.wrapper))
            for key, stack in patching._PATCHES._stacks.items()
            for patch in stack
        ),
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


def test_vllm_finds_our_model_stubs(started: Any) -> None:
    found, _ = started
    assert found["model"] == "vllm_moe_compat.backend.vllm.model_stubs"
    assert found["quantization"] == ["vllm_moe_compat.backend.vllm.model_stubs"] * 2


def test_log_lines_reach_vllms_handlers_once(started: Any) -> None:
    _, output = started
    (line,) = [line for line in output.splitlines() if "a line of ours" in line]
    assert line.partition("INFO ")[2].endswith("moe_compat: a line of ours")
    assert "not at this level" not in output


def test_outside_vllm_the_application_configures_log_lines() -> None:
    result = fresh(
        "from vllm_moe_compat.log import logger; logger.info('quiet')\n"
        "import logging; logging.basicConfig(level=logging.INFO); logger.info('spoken')"
    )
    assert result.returncode == 0
    assert result.stdout + result.stderr == "INFO:vllm_moe_compat:moe_compat: spoken\n"


def test_an_invalid_setting_is_logged_since_vllm_swallows_it() -> None:
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


def test_an_invalid_setting_ends_the_start_with_its_message() -> None:
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
