"""Each of two ranks records the states of its part of the heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import ranks

FAMILIES = ("qwen3_next", "qwen3_5_moe", "kimi_linear", "olmo_hybrid")


@pytest.mark.full
def test_two_ranks_record_the_states_of_their_heads(tmp_path: Path) -> None:
    for rank in ranks.run("support.rank_states", tmp_path, 2, *FAMILIES):
        for name, each in rank.items():
            assert each["unsupported"] == "", (name, each)
            assert each["wrong"] == 0 < each["compared"], (name, each)
            assert each["cut"] > 0, (name, each)
