"""No step copies a pool: counted in bytes, since a copy changes no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from support import compiled, hybrid, models
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step import compiled_decode
from vllm_moe_compat.backend.step.batch import make_pass
from vllm_moe_compat.backend.step.forward import Forward

POOL_BYTES = 64 << 20
# A step may take the activations of this small model, and no part of a pool.
ALLOWED = POOL_BYTES // 16


@pytest.fixture(scope="module")
def model() -> Any:
    return hybrid.model()


@pytest.fixture
def storage(model: Any) -> LayerStorage:
    return hybrid.storage(model, POOL_BYTES)


def growth(step: Callable[[], Any]) -> int:
    """Bytes by which the peak exceeds what is held before ``step``."""
    mx.clear_cache()
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step()
    return int(mx.get_peak_memory()) - int(before)


@pytest.mark.parametrize(
    "compiles",
    [
        pytest.param(False, id="plain"),
        pytest.param(True, id="compiled", marks=compiled.same_bits),
    ],
)
@pytest.mark.parametrize("greedy", [True, False], ids=["next pass built early", "one by one"])
def test_decode_steps_grow_by_far_less_than_a_pool(
    model: Any,
    storage: LayerStorage,
    greedy: bool,
    compiles: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled_decode, "PASSES_BEFORE_COMPILING", 2)
    forward = Forward(model, storage, compiles=compiles)
    rows = hybrid.requests([40, 17, 33, 5])
    hybrid.prefill(forward, rows)
    hybrid.decode(forward, rows, greedy=greedy)

    def steps() -> None:
        for _ in range(20):
            hybrid.decode(forward, rows, greedy=greedy)

    assert growth(steps) < ALLOWED
    assert (forward.hits > 0) == greedy
    assert (forward.compiled.passes > 10) == compiles


def test_a_prompt_grows_by_far_less_than_a_pool(model: Any, storage: LayerStorage) -> None:
    forward = Forward(model, storage)
    rows = hybrid.requests([40, 17, 33, 5])
    assert growth(lambda: hybrid.prefill(forward, rows)) < ALLOWED


@pytest.mark.parametrize("path", ["on_pool", "per_request", "gather"])
def test_no_read_path_copies_a_pool(
    model: Any, storage: LayerStorage, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_moe_compat.backend.pages import decode_attention

    monkeypatch.setattr(decode_attention, "choose_path", lambda metadata, dtype: path)
    forward = Forward(model, storage)
    rows = hybrid.requests([40, 17, 33, 5])
    hybrid.prefill(forward, rows)
    hybrid.decode(forward, rows)
    assert growth(lambda: hybrid.decode(forward, rows)) < ALLOWED


@pytest.mark.parametrize("path", ["on_pool", "per_request", "gather"])
@pytest.mark.parametrize("name", ["gpt_oss", "gemma4_text", "deepseek_v3"])
def test_layers_that_share_a_pool_in_one_pass_do_not_copy_it(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windowed and full layers, or latents: several layers write to a pool in a pass."""
    from vllm_moe_compat.backend.pages import decode_attention

    monkeypatch.setattr(decode_attention, "choose_path", lambda metadata, dtype: path)
    served, _ = models.build_mlx(name)
    storage = hybrid.softmax_storage(served, POOL_BYTES)
    rows = hybrid.softmax_requests(storage, [40, 17, 33, 5])
    forward = Forward(served, storage)
    assert growth(lambda: hybrid.prefill(forward, rows)) < ALLOWED
    assert growth(lambda: hybrid.decode(forward, rows)) < ALLOWED
    assert growth(lambda: [hybrid.decode(forward, rows, greedy=True) for _ in range(6)]) < ALLOWED
    own = [row.output for row in rows]
    for row in rows:
        row.output = []
    # The prompts again, in chunks, on pages that hold the same.
    forward(make_pass([(row, 0, 4) for row in rows]), [])
    chunks = make_pass([(row, 4, len(row.prompt) - 5) for row in rows if len(row.prompt) > 5])
    assert growth(lambda: forward(chunks, [])) < ALLOWED
    for _ in own[0]:
        hybrid.decode(forward, rows)
    assert [row.output for row in rows] == own


def test_a_pass_built_early_is_gone_before_a_page_is_written(
    model: Any, storage: LayerStorage
) -> None:
    forward = Forward(model, storage)
    rows = hybrid.requests([40, 17, 33, 5])
    hybrid.prefill(forward, rows)
    hybrid.decode(forward, rows, greedy=True)
    # Another batch than the one that was built for: the pass built early is stale.
    for pool in storage.distinct_pools:
        pool.zero([1])
    assert growth(lambda: hybrid.decode(forward, rows[:2], greedy=True)) < ALLOWED


def test_the_count_sees_a_copy(model: Any, storage: LayerStorage) -> None:
    forward = Forward(model, storage)
    rows = hybrid.requests([40, 17])
    hybrid.prefill(forward, rows)
    views = [pool.pages for pool in storage.distinct_pools]
    assert growth(lambda: hybrid.decode(forward, rows)) >= POOL_BYTES
    assert views[0] is not storage.distinct_pools[0].pages
