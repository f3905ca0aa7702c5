from __future__ import annotations

from pathlib import Path

import pytest

from vllm_moe_compat import demo


@pytest.fixture(scope="session")
def demo_path(demo_checkpoint: demo.DemoCheckpoint) -> Path:
    return demo_checkpoint.path
