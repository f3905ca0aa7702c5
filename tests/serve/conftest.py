from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.engine import Greedy
from vllm_moe_compat import demo


@pytest.fixture(scope="session")
def demo_path(demo_checkpoint: demo.DemoCheckpoint) -> Path:
    return demo_checkpoint.path


@pytest.fixture(scope="session")
def greedy(demo_path: Path) -> Greedy:
    """mlx-lm's greedy continuations of the demo checkpoint; several files share prompts."""
    return Greedy(demo_path)


@pytest.fixture(scope="session")
def schedule_budget(request: pytest.FixtureRequest) -> int:
    """Random schedules per setting: ``--schedules N`` for a longer run."""
    return int(request.config.getoption("--schedules"))


@pytest.fixture(scope="module", autouse=True)
def _collect() -> Iterator[None]:
    """Collect garbage once per file; ``support.engine`` stops vLLM from doing so per engine."""
    yield
    gc.collect()
