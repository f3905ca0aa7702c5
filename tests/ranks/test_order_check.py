"""Ranks that are about to evaluate different things end with one sentence, on all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import ranks


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_difference_is_named(count: int, tmp_path: Path) -> None:
    one, *others = ranks.run("support.rank_order", tmp_path, count)
    assert all(found == one for found in others)
    assert one.pop("the same") == ""
    last = count - 1
    words = {
        "tokens": "tokens",
        "kind": "kind of evaluation",
        "count": "number of evaluations",
        "step": "step",
    }
    for case, word in words.items():
        assert f"the {word} on rank {last} differs from that on rank 0" in one[case]
    assert one["tokens"].startswith("Step 1, evaluation 3: ")
