from __future__ import annotations

import gc
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Workers share the cores: each computes on one. Set before torch and MLX are imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

import hypothesis
from filelock import FileLock

from support import parallel
from vllm_moe_compat import demo

ROOT = Path(__file__).resolve().parent.parent

# No deadline per example: another worker on the same cores slows them down.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def demo_checkpoint() -> demo.DemoCheckpoint:
    """The demo checkpoint, in the folder that scripts/demo uses too; read only."""
    folder = ROOT / ".cache" / "demo"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # one worker trains it, the others wait
        return demo.build(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="select the tests of the full lane, too (marker `full`, see CONTRIBUTING.md)",
    )
    parser.addoption(
        "--schedules",
        type=int,
        default=2,
        help="random schedules per setting in tests/serve/test_schedules.py (default 2)",
    )
    parser.addoption(
        "--api-examples",
        type=int,
        default=10,
        help="random requests per endpoint and kind in tests/faults/test_api.py (default 10)",
    )
    parser.addoption(
        "--record-parity",
        metavar="PATH",
        help="write what tests/parity measures, with the plugin and without, as JSON; "
        "implies --full",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of the full lane, and note their number."""
    full = [item for item in items if item.get_closest_marker("full")]
    if full and not (config.getoption("--full") or config.getoption("--record-parity")):
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        note = f"daily choice: {len(full)} tests are left to the full lane; --full selects them"
        parallel.hand_over(config, parallel.NOTES, [note])
    absent = [item for item in items if not all(map(_is_there, item.iter_markers("needs")))]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]
        listed = sorted({str(m.args) for item in absent for m in item.iter_markers("needs")})
        note = f"left out, since the packages do not have it: {len(absent)}: {', '.join(listed)}"
        parallel.hand_over(config, parallel.NOTES, [note])
    if parallel.is_worker(config):
        parallel.longest_first(items)


def _is_there(mark: pytest.Mark) -> bool:
    """Whether the source of an installed package has a text: ``needs("mlx_lm/utils.py", text)``."""
    package, _, file = mark.args[0].partition("/")
    spec = importlib.util.find_spec(package)
    folder = next(iter((spec and spec.submodule_search_locations) or ()), None)
    source = folder and Path(folder, file)
    return bool(source and source.is_file() and mark.args[1] in source.read_text())


def pytest_collection_finish(session: pytest.Session) -> None:
    # Imported modules are a million objects, which every collection would visit again.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getoption("dist") == "loadfile":
        return parallel.Scheduling(config, log)
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    parallel.take_over(node.config, getattr(node, "workeroutput", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # or MLX's and Triton's bindings report leaks at the interpreter's exit
    path = session.config.getoption("--record-parity")
    if path is not None and not parallel.is_worker(session.config):
        cells = sorted(parallel.collected(session.config, parallel.CELLS))
        Path(path).write_text(json.dumps([row for _, row in cells], indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for note in dict.fromkeys(parallel.collected(config, parallel.NOTES)):
        terminalreporter.write_line(note, yellow=True)


@pytest.fixture(autouse=True)
def _hooks_stay_in() -> Iterator[None]:
    """Put hooks back that a test has taken out.

    vLLM loads its plugins once per process: what a test takes out stays out.
    """
    from vllm_moe_compat.load import patching

    before = patching._applied
    yield
    if before and not patching._applied:
        patching.apply()
