"""The start-up check of prediction heads: right heads pass, wrong ones are refused by name."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from support import heads as small
from support import hybrid
from vllm_moe_compat.backend.pages.paged_kv import PagedKV
from vllm_moe_compat.backend.step import head_check
from vllm_moe_compat.backend.step.head_passes import HeadPasses
from vllm_moe_compat.errors import UnsupportedServingError


@pytest.fixture
def passes() -> Any:
    heads = small.RandomHeads(hybrid.model())
    made = HeadPasses(heads, small.storage(heads, 1 << 20), small.VOCABULARY)
    yield made
    made.close()


def test_right_heads_pass_and_leave_the_pages_as_they_were(passes: HeadPasses) -> None:
    head_check.run(passes)
    (pool,) = passes.storage.distinct_pools
    assert not mx.any(pool.pages).item()


def test_heads_that_see_the_positions_of_others_are_refused(
    passes: HeadPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = small.RandomHeads.decode

    def shifted(self: Any, tokens: mx.array, hidden: mx.array, cache: Any) -> Any:
        if isinstance(cache[0], PagedKV):
            cache[0].offset = cache[0].offset + 1
        return compute(self, tokens, hidden[:, ::-1], cache)

    monkeypatch.setattr(small.RandomHeads, "decode", shifted)
    with pytest.raises(UnsupportedServingError, match="the prediction head on pages differs"):
        head_check.run(passes)


def test_what_is_not_finite_in_mlx_lm_either_is_left_alone(
    passes: HeadPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = small.RandomHeads.embed
    monkeypatch.setattr(
        small.RandomHeads, "embed", lambda self, tokens: compute(self, tokens) * float("nan")
    )
    head_check.run(passes)
