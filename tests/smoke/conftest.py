"""The gate of the smoke tests: a checkpoint that the environment names.

``VLLM_MOE_COMPAT_SMOKE_MODEL=/path`` selects them; without it they are deselected
and the summary says so, and a run of nothing else ends with pytest's exit code 5.
``VLLM_MOE_COMPAT_SMOKE_GOLDEN=/file.json`` adds those that compare text. Who named
a checkpoint wants it tested, so a skip among the selected ones is a failure.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from vllm_moe_compat.envs import SMOKE_GOLDEN, SMOKE_MODEL

_LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    smoke = [item for item in items if item.get_closest_marker("smoke")]
    out, reasons = [], []
    if smoke and not SMOKE_MODEL.read():
        out = smoke
        reasons.append(
            f"no smoke model: {len(out)} smoke tests deselected; "
            f"{SMOKE_MODEL.name}=/path/of/a/checkpoint selects them"
        )
    elif smoke and not SMOKE_GOLDEN.read():
        out = [item for item in smoke if "golden" in getattr(item, "fixturenames", ())]
        if out:
            reasons.append(
                f"no golden text: {len(out)} smoke tests deselected; "
                f"{SMOKE_GOLDEN.name}=/file.json selects them"
            )
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]
    config.stash[_LEFT_OUT] = reasons
    if hasattr(config, "workeroutput"):  # one of pytest-xdist's: tests/conftest.py prints them
        config.workeroutput.setdefault("notes", []).extend(reasons)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for reason in config.stash.get(_LEFT_OUT, []):
        terminalreporter.write_line(reason, yellow=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.get_closest_marker("smoke"):
        report.outcome = "failed"
        report.longrepr = f"a smoke test may not skip: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def smoke_model() -> Path:
    """The checkpoint's folder."""
    path = Path(SMOKE_MODEL.read()).expanduser().absolute()
    for wanted in ("config.json", "model*.safetensors"):
        if not list(path.glob(wanted)):
            pytest.fail(f"{SMOKE_MODEL.name}={path}: no {wanted} in that folder", pytrace=False)
    return path


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """``{"prompt": str, "text": str, "max_tokens": int}``: a greedy continuation."""
    path = Path(SMOKE_GOLDEN.read()).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: content[name] for name in ("prompt", "text", "max_tokens")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        pytest.fail(
            f"{SMOKE_GOLDEN.name}={path}: not a JSON file with prompt, text and max_tokens "
            f"({error!r})",
            pytrace=False,
        )


@pytest.fixture(scope="session")
def cache_bytes(smoke_model: Path) -> int:
    """Bytes of KV cache: what a few short requests need grows with the model."""
    files = sum(file.stat().st_size for file in smoke_model.glob("model*.safetensors"))
    return max(32 << 20, files // 32)
