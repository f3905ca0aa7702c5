from __future__ import annotations

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
