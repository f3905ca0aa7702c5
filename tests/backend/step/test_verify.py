"""A pass that verifies drafts gives the logits of passes of one token, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from support import hybrid
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Batch, Request
from vllm_moe_compat.backend.step.forward import Forward

STEPS = 14
NAN = 0x7FC00000


def _built(module: Any, **config: Any) -> Any:
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda x: x * 3 if x.ndim > 1 else x, model.parameters()))
    mx.eval(model.parameters())
    return model


def plain() -> Any:
    from mlx_lm.models import qwen3_moe

    return _built(
        qwen3_moe,
        model_type="qwen3_moe",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rms_norm_eps=1e-6,
        vocab_size=96,
        rope_theta=10000,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        norm_topk_prob=True,
    )


def windowed() -> Any:
    from mlx_lm.models import gpt_oss

    return _built(
        gpt_oss,
        model_type="gpt_oss",
        hidden_size=64,
        num_hidden_layers=4,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=24,
        rms_norm_eps=1e-6,
        vocab_size=96,
        rope_theta=10000,
    )


def latent() -> Any:
    from mlx_lm.models import deepseek_v3

    return _built(
        deepseek_v3,
        model_type="deepseek_v3",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        vocab_size=96,
    )


def _prepare(storage: LayerStorage, rows: list[Request]) -> tuple[Batch, dict[str, int]]:
    """Mark every row as at its last token; zero the pages that begin, as the runner does."""
    batch = Batch()
    batch.requests = {row.req_id: row for row in rows}
    for row in rows:
        row.computed = row.num_tokens - 1
    scheduled = {row.req_id: 1 for row in rows}
    storage.zero_blocks(batch.partial_blocks(scheduled, storage.attention_block_sizes))
    return batch, scheduled


def _begin(served: Any) -> tuple[Forward, LayerStorage, list[Request]]:
    storage = hybrid.softmax_storage(served, 1 << 20)
    for pool in storage.distinct_pools:
        pool.pages[1:] = mx.array(NAN, dtype=mx.uint32)
    forward = Forward(served, storage)
    rows = hybrid.softmax_requests(storage, [31, 40, 3])
    batch = Batch()
    batch.requests = {row.req_id: row for row in rows}
    scheduled = {row.req_id: len(row.prompt) for row in rows}
    storage.zero_blocks(batch.partial_blocks(scheduled, storage.attention_block_sizes))
    hybrid.prefill(forward, rows)
    return forward, storage, rows


def unspeculated(served: Any) -> list[list[Any]]:
    """Return the logits ``[V]`` of each step and row."""
    forward, storage, rows = _begin(served)
    found: list[list[Any]] = [[] for _ in rows]
    for _ in range(STEPS):
        _prepare(storage, rows)
        logits = hybrid.decode(forward, rows)
        for row, one in enumerate(logits):
            found[row].append(np.array(one))
    forward.close()
    return found


def wrong(token: int) -> int:
    return (token + 1) % hybrid.TEXT["vocab_size"]


PATTERNS: dict[str, Callable[[int, int], int]] = {
    "none right": lambda step, row: 0,
    "all right": lambda step, row: 4,
    "some right, a different number in each row": lambda step, row: (step + 2 * row) % 5,
}


@pytest.mark.parametrize("family", [plain, windowed, latent], ids=lambda x: x.__name__)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_those_of_passes_of_one_token(family: Callable[[], Any], pattern: str) -> None:
    served = family()
    expected = unspeculated(served)
    tokens = [[int(one.argmax()) for one in row] for row in expected]
    forward, storage, rows = _begin(served)
    step = 0
    while any(len(row.output) < STEPS for row in rows):
        for number, row in enumerate(rows):
            right = PATTERNS[pattern](step, number)
            coming = tokens[number][len(row.output) : len(row.output) + 4]
            row.drafts = coming[:right] + [wrong(token) for token in coming[right:]]
            # Rows of different widths, one of them without drafts.
            row.drafts = row.drafts[: (3 * step + number) % 5]
        rows = [row for row in rows if len(row.output) < STEPS]
        batch, scheduled = _prepare(storage, rows)
        work = batch.decodes([row.req_id for row in rows], scheduled)
        if not work.verifies:
            hybrid.decode(forward, rows)
            step += 1
            continue
        logits = np.array(forward.verify(work))
        assert len(logits) == work.lengths.sum()
        first, counts = 0, {}
        for row in rows:
            number = int(row.req_id[1:])
            stay = 0
            for draft in [*row.drafts, None]:
                place = len(row.output)
                if place < STEPS:
                    assert np.array_equal(logits[first + stay], expected[number][place])
                token = int(logits[first + stay].argmax())
                row.output.append(token)
                stay += 1
                if token != draft:
                    break
            counts[row.req_id] = stay
            first += 1 + len(row.drafts)
        forward.accept(counts)
        step += 1
    assert step < STEPS or pattern == "none right"
    forward.close()


def test_a_discarded_draft_that_computes_nan_leaves_nothing_behind() -> None:
    served = plain()
    poison = 7
    served.model.embed_tokens.weight[poison] = mx.array(float("nan"))
    expected = unspeculated(served)
    tokens = [[int(one.argmax()) for one in row] for row in expected]
    assert all(poison not in row for row in tokens), "choose another token"
    forward, storage, rows = _begin(served)
    rows = [row for row in rows if poison not in row.prompt]
    for place in range(STEPS - 2):
        for number, row in enumerate(rows):
            row.drafts = [poison] * (2 + number)
        batch, scheduled = _prepare(storage, rows)
        work = batch.decodes([row.req_id for row in rows], scheduled)
        logits = np.array(forward.verify(work))
        first = 0
        for row in rows:
            number = int(row.req_id[1:])
            assert (logits[first] == expected[number][place]).all()
            assert np.isnan(logits[first + 1]).all()
            row.output.append(tokens[number][place])
            first += 1 + len(row.drafts)
        forward.accept({row.req_id: 1 for row in rows})
    forward.close()
