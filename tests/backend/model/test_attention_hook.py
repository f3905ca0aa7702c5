"""The attention hook: where it applies, and that it is removed."""

from __future__ import annotations

import gc
from types import ModuleType

import mlx.core as mx
import pytest
from mlx_lm.models import base, qwen3_next
from mlx_lm.models.cache import KVCache

from support import hybrid
from vllm_moe_compat.backend.model import attention_hook
from vllm_moe_compat.backend.step.forward import Forward


@pytest.fixture
def module() -> ModuleType:
    """The module whose attention function the hybrid model calls, without a hook."""
    gc.collect()
    assert attention_hook.installed() == [], "an earlier test left the hook installed"
    return qwen3_next


def test_only_the_modules_of_the_served_model_are_hooked(module: ModuleType) -> None:
    from mlx_lm.models import llama

    remove = attention_hook.install(hybrid.model())
    assert module.scaled_dot_product_attention is attention_hook.attention
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    remove()
    assert module.scaled_dot_product_attention is base.scaled_dot_product_attention


def test_the_hook_stays_until_the_last_model_that_needs_it_is_removed(module: ModuleType) -> None:
    """Without the hook, paged caches of the other model would give wrong results."""
    served = hybrid.model()
    first, second = attention_hook.install(served), attention_hook.install(served)
    first()
    first()
    assert module.scaled_dot_product_attention is attention_hook.attention
    second()
    assert module.scaled_dot_product_attention is base.scaled_dot_product_attention


def test_mlx_lms_own_caches_are_not_affected(module: ModuleType) -> None:
    served = hybrid.model()
    tokens = mx.array([[3, 5, 7, 11]])
    before = served(tokens, cache=served.make_cache())
    remove = attention_hook.install(served)
    assert mx.array_equal(served(tokens, cache=served.make_cache()), before).item()
    assert not hasattr(KVCache(), "attend")
    remove()


def test_a_closed_or_collected_forward_leaves_no_hook(module: ModuleType) -> None:
    served = hybrid.model()
    forward = Forward(served, hybrid.storage(served, 1 << 20))
    assert module.scaled_dot_product_attention is attention_hook.attention
    forward.close()
    forward.close()
    assert module.scaled_dot_product_attention is base.scaled_dot_product_attention
    forward = Forward(served, hybrid.storage(served, 1 << 20))
    del forward
    gc.collect()
    assert module.scaled_dot_product_attention is base.scaled_dot_product_attention
