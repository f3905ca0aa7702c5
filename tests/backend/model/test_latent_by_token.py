"""Latent attention of a pass over drafts has the bits of passes of one token."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from parity.available import is_installed
from support import hybrid, models
from support.drafted import MOST, STEPS, Served
from vllm_moe_compat.backend.model.experts import widen_experts
from vllm_moe_compat.backend.model.latent_by_token import LatentByToken
from vllm_moe_compat.backend.model.state_recording import StateRecording

NAMES = ("deepseek_v3", "glm4_moe_lite", "mistral4", "longcat_flash", "kimi_linear", "deepseek_v2")


@pytest.mark.parametrize("name", [x for x in NAMES if is_installed(x)])
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [((6, 11, 3), mx.float32), ((7,), mx.float32), ((6, 11, 3), mx.bfloat16), ((7,), mx.bfloat16)],
)
def test_logits_are_those_of_passes_of_one_token(
    name: str, lengths: tuple[int, ...], dtype: mx.Dtype
) -> None:
    model, _ = models.build_mlx(name)
    model.set_dtype(dtype)
    widen_experts(model)
    mx.eval(model.parameters())
    alone = Served(model, lengths)
    expected: list[list[Any]] = [[] for _ in lengths]
    for _ in range(STEPS + MOST):
        alone.begin()
        for logits, found in zip(hybrid.decode(alone.forward, alone.rows), expected, strict=True):
            found.append(np.array(logits.astype(mx.float32)))
    tokens = [row.output for row in alone.rows]
    alone.forward.close()
    served = Served(model, lengths)
    if served.storage.states.layers:
        served.forward.recording = StateRecording(model)
    compared = 0
    for step in range(1, 8):
        scheduled = served.begin()
        counts = served.draft(step, tokens)
        work = served.batch.decodes([row.req_id for row in served.rows], scheduled)
        if not work.verifies:
            continue
        found_here = iter(served.forward.verify(work))
        served.forward.accept(counts)
        for row, theirs, output in zip(served.rows, expected, tokens, strict=True):
            logits = [
                np.array(next(found_here).astype(mx.float32)) for _ in range(1 + len(row.drafts))
            ]
            for place in range(counts[row.req_id]):
                assert np.array_equal(logits[place], theirs[len(row.output) + place])
                compared += place > 0
            row.output += output[len(row.output) :][: counts[row.req_id]]
    assert compared > 3
    served.forward.close()


def test_the_layers_keep_their_classes() -> None:
    model, _ = models.build_mlx("deepseek_v3")
    before = [type(part) for part in model.modules()]

    def stop() -> None:
        with LatentByToken(model).during():
            assert [type(part) for part in model.modules()] != before
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop()
    assert [type(part) for part in model.modules()] == before
