"""A rank that decodes in another order than the others ends the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import rank_engine

pytestmark = [pytest.mark.serve, pytest.mark.full, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_a_rank_in_another_order(kind: str, demo_path: Path) -> None:
    with pytest.raises(rank_engine.EngineFailedError) as failure:
        rank_engine.run(
            demo_path,
            [{"spoil": 1}, {"prompts": [[5, 6, 7, 8], [9, 8, 7]]}],
            max_model_len=256,
            max_num_seqs=4,
            kv_cache_memory_bytes=2_000_000,
            **{f"{kind}_parallel_size": 2},
        )
    lines = failure.value.log.splitlines()
    # The engine's own line, behind those of the ranks.
    (told,) = [line for line in lines if "EngineCore" in line and "RuntimeError: Worker" in line][
        -1:
    ]
    assert "the requests on rank 1 differs from that on rank 0" in told
