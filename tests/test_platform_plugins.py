"""Beside other platform plugins: which one the real vLLM takes, and what is said.

The other plugins are distributions in a folder of the search path. The scenarios run one after
another in one process, in which vLLM resolves its platform anew for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.distributions import PLATFORM, distribution
from vllm_moe_compat.plugin import PLATFORM_CLASS

BACKEND = "VLLM_MOE_COMPAT_BACKEND"
PLUGINS = "VLLM_PLUGINS"
OURS = "moe_compat,moe_compat_mlx"
# The value that loads everything but the other platform, vLLM's own general plugins too.
WANTED = f"{OURS},lora_filesystem_resolver,lora_hf_hub_resolver"

RESOLVE = """
import json, logging, os, sys
from vllm.platforms import resolve_current_platform_cls_qualname
from vllm.plugins import load_plugins_by_group
from vllm_moe_compat import plugin
from vllm_moe_compat.who_serves import who_serves

class Lines(logging.Handler):
    def emit(self, record):
        self.said.append(record.getMessage())

lines = Lines()
logging.getLogger("vllm").addHandler(lines)
logging.getLogger("vllm").setLevel(logging.INFO)
found, path = [], list(sys.path)
for environment, folder in json.load(sys.stdin):
    for name in [n for n in os.environ if n.startswith("VLLM_")]:
        del os.environ[name]
    os.environ.update(environment)
    before = set(sys.modules)
    sys.path[:] = [folder, *path]
    lines.said = []
    plugin._said.clear()
    try:
        answer = resolve_current_platform_cls_qualname()
    except RuntimeError as error:
        lines.said.append(str(error))
        answer = ""
    general = load_plugins_by_group("vllm.general_plugins")
    if "moe_compat" in general:
        general["moe_compat"]()
    said = [line for line in lines.said if "moe_compat: " in line or "Only one" in line]
    said = [line for line in said if "vllm_moe_compat with mlx" not in line]
    found.append([answer, *who_serves(), sorted(general), said])
    for name in set(sys.modules) - before:
        if name.startswith(("vllm_metal", "vllm_mlx", "mine")):
            del sys.modules[name]
print()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Scenario:
    """What is set and installed, and what has to come out.

    ``platform``: the class; empty if vLLM refuses to start. ``said``: parts of our lines, in
    their order; a line that is not listed must not be there.
    """

    environment: Mapping[str, str]
    folder: str
    platform: str
    server: str
    said: tuple[str, ...] = ()


NONE = "vllm.platforms.interface.UnspecifiedPlatform"
BOTH = "Only one platform plugin can be activated"
SCENARIOS = {
    "alone": Scenario({}, "none", PLATFORM_CLASS, "embedded"),
    "beside vllm-metal": Scenario(
        {}, "metal", "vllm_metal.Platform", "vllm-metal", ("vllm-metal serves, since",)
    ),
    "beside vllm-metal under another name": Scenario(
        {}, "renamed", "vllm_metal.Platform", "vllm-metal", ("platform plugin 'apple'",)
    ),
    "beside vllm-mlx": Scenario(
        {}, "mlx", "vllm_mlx.Platform", "vllm-mlx", ("vllm-mlx serves, since",)
    ),
    "vllm-metal first in the list": Scenario(
        {PLUGINS: f"metal,{OURS}"},
        "metal",
        "vllm_metal.Platform",
        "vllm-metal",
        ("vllm-metal serves",),
    ),
    "vllm-metal last in the list": Scenario(
        {PLUGINS: "moe_compat_mlx,moe_compat,metal"},
        "metal",
        "vllm_metal.Platform",
        "vllm-metal",
        ("vllm-metal serves",),
    ),
    "only the hooks in the list": Scenario(
        {PLUGINS: "metal,moe_compat"},
        "metal",
        "vllm_metal.Platform",
        "vllm-metal",
        ("vllm-metal serves",),
    ),
    "vllm-metal left out of the list": Scenario(
        {PLUGINS: OURS}, "metal", PLATFORM_CLASS, "embedded"
    ),
    "both left out of the list": Scenario(
        {PLUGINS: "moe_compat"},
        "metal",
        NONE,
        "nobody",
        ("VLLM_PLUGINS leaves out moe_compat_mlx; our load hooks",),
    ),
    "the backend off": Scenario(
        {BACKEND: "off"}, "metal", "vllm_metal.Platform", "nobody", (f"{BACKEND}=off is set",)
    ),
    "the plugin off": Scenario({"VLLM_MOE_COMPAT": "0"}, "metal", "vllm_metal.Platform", "nobody"),
    "vllm-metal cannot be imported": Scenario(
        {},
        "unimportable",
        PLATFORM_CLASS,
        "embedded",
        (
            "the platform plugin 'metal' of vllm-metal failed (ImportError: no libmetal), so the "
            "embedded MLX platform serves",
        ),
    ),
    "vllm-metal's function is not there": Scenario(
        {}, "missing", PLATFORM_CLASS, "embedded", ("vllm-metal failed (AttributeError: ",)
    ),
    "vllm-metal's function fails": Scenario(
        {}, "failing", PLATFORM_CLASS, "embedded", ("vllm-metal failed (OSError: no device), so",)
    ),
    "vllm-metal is broken, vllm-mlx is not": Scenario(
        {},
        "half",
        "vllm_mlx.Platform",
        "vllm-mlx",
        ("vllm-metal failed (OSError: no device), so vllm-mlx serves", "vllm-mlx serves, since"),
    ),
    "a broken one left out of the list": Scenario(
        {PLUGINS: OURS}, "failing", PLATFORM_CLASS, "embedded"
    ),
    "vllm-metal answers that it is not for this machine": Scenario(
        {}, "inactive", PLATFORM_CLASS, "embedded"
    ),
    "embedded": Scenario(
        {BACKEND: "embedded"},
        "metal",
        "",
        "embedded",
        (f"'metal' of vllm-metal is active, where vLLM accepts one platform; set {PLUGINS}=", BOTH),
    ),
    "embedded with the list that is named": Scenario(
        {BACKEND: "embedded", PLUGINS: WANTED}, "metal", PLATFORM_CLASS, "embedded"
    ),
    "embedded beside vllm-mlx": Scenario(
        {BACKEND: "embedded"}, "mlx", "", "embedded", (f"set {PLUGINS}={WANTED},mine for", BOTH)
    ),
    "embedded beside vllm-mlx with the list that is named": Scenario(
        {BACKEND: "embedded", PLUGINS: f"{WANTED},mine"}, "mlx", PLATFORM_CLASS, "embedded"
    ),
    "embedded beside both": Scenario(
        {BACKEND: "embedded"}, "two", "", "embedded", (f"set {PLUGINS}={WANTED} for", BOTH)
    ),
    "embedded with a list of the user's": Scenario(
        {BACKEND: "embedded", PLUGINS: "mine,mlx,moe_compat_mlx,moe_compat"},
        "mlx",
        "",
        "embedded",
        (f"set {PLUGINS}={OURS},mine for", BOTH),
    ),
    "embedded with a list without ours": Scenario(
        {BACKEND: "embedded", PLUGINS: "metal,moe_compat"},
        "metal",
        "vllm_metal.Platform",
        "vllm-metal",
        (
            f"{PLUGINS} leaves out moe_compat_mlx, so vllm-metal serves; set {PLUGINS}={OURS}.",
            "vllm-metal serves, since",
        ),
    ),
    "embedded beside a broken one": Scenario(
        {BACKEND: "embedded"}, "failing", PLATFORM_CLASS, "embedded"
    ),
    "a plugin that asks all others itself": Scenario(
        {}, "asking", "vllm_metal.Platform", "vllm-metal", ("vllm-metal serves",)
    ),
}

METAL = f"{PLATFORM}\ndef register():\n    return 'vllm_metal.Platform'\n"
MLX = f"{PLATFORM}\ndef platform():\n    return 'vllm_mlx.Platform'\n"
FAILING = "def register():\n    raise OSError('no device')\n"
ASKING = f"""{PLATFORM}
from importlib.metadata import entry_points
def register():
    others = [p for p in entry_points(group="vllm.platform_plugins") if p.name != "metal"]
    return None if any(p.load()() for p in others) else "vllm_metal.Platform"
"""
ENTRY = "metal = vllm_metal:register"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of a search path per set of installed plugins."""
    root = tmp_path_factory.mktemp("folders")
    metals = {
        "metal": (METAL, ENTRY),
        "renamed": (METAL, "apple = vllm_metal:register"),
        "unimportable": ("raise ImportError('no libmetal')", ENTRY),
        "missing": ("", ENTRY),
        "failing": (FAILING, ENTRY),
        "half": (FAILING, ENTRY),
        "inactive": ("def register():\n    return None\n", ENTRY),
        "two": (METAL, ENTRY),
        "asking": (ASKING, ENTRY),
    }
    for folder, (text, entry) in metals.items():
        distribution(root / folder, "vllm-metal", "vllm_metal", text, platform_plugins=entry)
    for folder in ("mlx", "two", "half"):
        distribution(
            root / folder,
            "vllm-mlx",
            "vllm_mlx",
            MLX,
            platform_plugins="mlx = vllm_mlx:platform",
            # It goes with its package.
            general_plugins="mlx_models = vllm_mlx:platform",
        )
    mine = "def register():\n    pass\n"
    distribution(root / "mlx", "my-models", "mine", mine, general_plugins="mine = mine:register")
    (root / "none").mkdir()
    return root


@pytest.fixture(scope="module")
def found(folders: Path) -> dict[str, Any]:
    """Each scenario's platform, server, reason, general plugins and lines."""
    asked = [(dict(s.environment), str(folders / s.folder)) for s in SCENARIOS.values()]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE],
        input=json.dumps(asked),
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(SCENARIOS, answers, strict=True))


@pytest.mark.parametrize("name", SCENARIOS)
def test_vllm_takes_one_platform_and_we_say_which(name: str, found: dict[str, Any]) -> None:
    scenario = SCENARIOS[name]
    platform, server, reason, _, said = found[name]
    assert (platform, server) == (scenario.platform, scenario.server), (reason, said)
    assert len(said) == len(scenario.said), said
    for line, part in zip(said, scenario.said, strict=True):
        assert part in line


def test_a_plugin_that_stays_out_is_named_in_the_reason(found: dict[str, Any]) -> None:
    reason = found["vllm-metal answers that it is not for this machine"][2]
    assert reason.endswith("the platform plugin 'metal' of vllm-metal stays out")


def test_the_named_list_keeps_every_other_general_plugin(found: dict[str, Any]) -> None:
    before = found["embedded beside vllm-mlx"][3]
    after = found["embedded beside vllm-mlx with the list that is named"][3]
    assert set(before) - set(after) == {"mlx_models"}


@pytest.mark.parametrize("value", ["", pytest.param(WANTED, marks=pytest.mark.full)])
def test_what_to_set_is_said_before_vllm_refuses_to_start(value: str, folders: Path) -> None:
    """In a process of its own; vLLM 0.27 resolves its platform when it is imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    path = os.pathsep.join([str(folders / "metal"), *filter(None, [clean.get("PYTHONPATH")])])
    environment = clean | {BACKEND: "embedded", "PYTHONPATH": path}
    if value:
        environment[PLUGINS] = value
    code = "import vllm\nfrom vllm.platforms import current_platform as p\nprint(type(p).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    output = done.stdout + done.stderr
    if value:
        assert done.stdout.splitlines()[-1] == "MlxPlatform", output
        assert "moe_compat: " not in output
        return
    assert done.returncode == 1
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    (ours,) = [n for n, line in enumerate(lines) if f"set {PLUGINS}={WANTED} for" in line]
    theirs = next(n for n, line in enumerate(lines) if BOTH in line)
    assert ours < theirs
