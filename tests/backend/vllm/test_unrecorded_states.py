"""A model whose states cannot be recorded is served without drafts, and says so."""

from __future__ import annotations

import logging
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

from support import hybrid
from vllm_moe_compat.backend.model.rows import TokenRows
from vllm_moe_compat.backend.step.drafting import Always, Drafting
from vllm_moe_compat.backend.step.ngram import NgramDrafter
from vllm_moe_compat.backend.vllm.runner import ModelRunner

KNOWN, OTHER = "gated_delta_update", "another_update"


def with_another_recurrence(model: Any) -> None:
    """Let the layers call their recurrence by a name that nobody knows."""
    from mlx_lm.models.qwen3_5 import GatedDeltaNet

    own = GatedDeltaNet.__call__
    names = tuple(OTHER if name == KNOWN else name for name in own.__code__.co_names)
    namespace = {name: value for name, value in own.__globals__.items() if name != KNOWN}
    call = FunctionType(
        own.__code__.replace(co_names=names),
        namespace | {OTHER: own.__globals__[KNOWN]},
        own.__name__,
        own.__defaults__,
        own.__closure__,
    )
    kind = type("Other", (GatedDeltaNet,), {"__call__": call})
    for part in model.modules():
        if type(part) is GatedDeltaNet:
            part.__class__ = kind


@pytest.mark.parametrize("known", [True, False])
def test_drafts_are_made_where_states_can_be_recorded(
    known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = hybrid.model()
    if not known:
        with_another_recurrence(model)
    sampler: Any = SimpleNamespace(rows=TokenRows(96, 96))
    drafting = Drafting(NgramDrafter(2, 3, 100), Always(2))
    with caplog.at_level(logging.WARNING):
        runner = ModelRunner(model, hybrid.storage(model, 1 << 20), sampler, drafting=drafting)
    assert (runner.drafting is drafting) == known
    words = [record.getMessage() for record in caplog.records]
    assert len(words) == (0 if known else 1)
    assert all(
        "No drafts are made, since states cannot be kept: array 1 of 2 of a state" in one
        for one in words
    )
    runner.close()
