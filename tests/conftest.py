from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_moe_compat import demo

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def demo_checkpoint() -> demo.DemoCheckpoint:
    """The demo checkpoint, in the folder that scripts/demo uses too; read only."""
    return demo.build(ROOT / ".cache" / "demo")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--schedules",
        type=int,
        default=2,
        help="random schedules per setting in tests/serve/test_schedules.py (default 2)",
    )
    parser.addoption(
        "--record-parity",
        metavar="PATH",
        help="write what tests/parity measures, with the plugin and without, as JSON",
    )


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
