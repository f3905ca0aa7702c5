"""Random passes through two layers: each row is the resident model's, or fails."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from support.memory_experts import cache_experts, container
from vllm_moe_compat.expert_cache.current_pass import current_pass

EXPERTS, WIDTH = 12, 64
LAYERS = ("first", "second")


class Layers(nn.Module):
    """Two layers of experts, whose routers choose by the tokens that reach them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = container("glu", EXPERTS, 1), container("4 bits", EXPERTS, 2)
        mx.random.seed(3)
        self.routers = [mx.random.normal((WIDTH, EXPERTS)) for _ in LAYERS]
        mx.eval(self.routers)

    def __call__(self, x: mx.array, chosen: int) -> tuple[mx.array, list[mx.array]]:
        """Return the result ``[B, T, D]`` and the experts that each layer chose."""
        choices = []
        for name, router in zip(LAYERS, self.routers, strict=True):
            indices = mx.argpartition(x @ router, kth=-chosen, axis=-1)[..., -chosen:]
            choices.append(indices)
            x = x + self[name](x, indices).sum(axis=-2)
        return x, choices


@cache
def resident() -> Layers:
    return Layers()


@settings(max_examples=40)
@given(data=st.data())
def test_a_row_is_that_of_the_resident_model_unless_it_needs_a_broken_expert(
    data: st.DataObject,
) -> None:
    draw = data.draw
    chosen = draw(st.integers(1, 3))
    model = Layers()
    sources = cache_experts(model, draw(st.integers(chosen, EXPERTS - 1)))
    for source in sources.values():
        source.broken = draw(st.sets(st.integers(0, EXPERTS - 1), max_size=2))
    broken = [sources[name].broken for name in LAYERS]
    for _ in range(draw(st.integers(1, 5))):
        rows, tokens = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 3, 24]))
        lengths = draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows))
        x = mx.random.normal((rows, tokens, WIDTH), key=mx.random.key(draw(st.integers(0, 99))))
        expected, choices = resident()(x, chosen)
        if not any(broken) and draw(st.booleans()):
            assert mx.array_equal(model(x, chosen)[0], expected)
            continue
        with current_pass(rows, tokens, lengths) as current:
            found, _ = model(x, chosen)
            mx.async_eval(found)
        failed = set()
        for row, length in enumerate(lengths):
            wanted = [set(np.array(experts)[row, :length].flat) for experts in choices]
            if any(a & b for a, b in zip(wanted, broken, strict=True)):
                failed.add(row)
            else:
                assert mx.array_equal(found[row, :length], expected[row, :length])
        assert set(current.failed_rows) == failed
