"""``CachedExperts`` computes bit for bit what the resident container computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.memory_experts import KINDS, cache_experts, cached, container
from vllm_moe_compat.backend.model.exact_scales import keep_scales
from vllm_moe_compat.backend.model.experts import widen_experts
from vllm_moe_compat.errors import CheckpointFileError, LayoutError, SettingError
from vllm_moe_compat.expert_cache.cached_experts import CachedExperts
from vllm_moe_compat.expert_cache.current_pass import building_only, current_pass

EXPERTS, CHOSEN = 16, 2
# 100, 50, 25 and 12.5 %; the last is also the least, the experts of one token.
SHARES = (16, 8, 4, 2)
# [B, T]: one token, a batch of decodes, a small prompt, a prompt that is sorted (64 pairs).
BATCHES = ((1, 1), (5, 1), (2, 7), (3, 40))


def chosen(rows: int, tokens: int, seed: int, experts: int = EXPERTS) -> mx.array:
    """Distinct random experts of each token, ``[B, T, k]``."""
    noise = np.random.default_rng(seed).random((rows, tokens, experts))
    return mx.array(np.argsort(noise, axis=-1)[..., :CHOSEN].astype(np.uint32))


def inputs(like: nn.Module, rows: int, tokens: int, seed: int) -> mx.array:
    first = next(layer for layer in like.values() if hasattr(layer, "input_dims"))
    return mx.random.normal((rows, tokens, first.input_dims), key=mx.random.key(seed))


def same(a: mx.array, b: mx.array) -> bool:
    """Same shape, dtype and bits; NaN never occurs."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_share_computes_the_same_bits(kind: str) -> None:
    resident = container(kind, EXPERTS)
    for slots in SHARES:
        experts, source = cached(resident, slots)
        for seed, (rows, tokens) in enumerate(BATCHES):
            x, indices = inputs(resident, rows, tokens, seed), chosen(rows, tokens, seed)
            assert same(experts(x, indices), resident(x, indices)), (slots, rows, tokens)
        assert source.asked


@pytest.mark.parametrize("kind", ["glu, biases", "mlp", "4 bits", "8 bits, biases"])
def test_narrow_activations_meet_float32_experts_as_in_the_resident_model(kind: str) -> None:
    """On the CPU, floats are widened; scales that bfloat16 cannot represent stay float32."""
    resident = container(kind, EXPERTS)
    if KINDS[kind][2] is None:
        resident.set_dtype(mx.bfloat16)
        assert widen_experts(resident)
    else:
        assert keep_scales(resident, mx.bfloat16)
    for slots in SHARES:
        experts, source = cached(resident, slots)
        assert mx.float32 in {spec.dtype for spec in source.specs.values()}
        for seed, (rows, tokens) in enumerate(BATCHES):
            x = inputs(resident, rows, tokens, seed).astype(mx.bfloat16)
            indices = chosen(rows, tokens, seed)
            out = experts(x, indices)
            assert same(out, resident(x, indices)), (slots, rows, tokens)
            assert out.dtype == mx.bfloat16


def test_tokens_may_come_flattened() -> None:
    resident = container("glu", EXPERTS)
    x, indices = inputs(resident, 3, 9, 0), chosen(3, 9, 0)
    flat_x, flat = x.reshape(27, -1), indices.reshape(27, CHOSEN)
    for slots in SHARES:
        experts, _ = cached(resident, slots)
        assert same(experts(flat_x, flat), resident(flat_x, flat))


def test_one_token_for_all_choices_is_broadcast() -> None:
    resident = container("glu", EXPERTS)
    x, indices = inputs(resident, 1, 1, 0), chosen(1, 20, 0)
    for slots in SHARES:
        experts, _ = cached(resident, slots)
        assert same(experts(x, indices), resident(mx.broadcast_to(x, (1, 20, 64)), indices))


def test_a_pass_reads_each_missing_expert_once() -> None:
    resident = container("glu", EXPERTS)
    for slots in SHARES:
        experts, source = cached(resident, slots)
        for seed in range(6):
            rows, tokens = ((2, 30), (1, 1))[seed % 2]
            before = len(source.asked)
            mx.eval(experts(inputs(resident, rows, tokens, seed), chosen(rows, tokens, seed)))
            read = Counter(expert for asked in source.asked[before:] for expert in asked)
            assert set(read.values()) <= {1}
            assert all(len(asked) <= slots for asked in source.asked[before:])


def test_results_that_are_not_evaluated_yet_keep_the_experts_that_they_were_built_on() -> None:
    resident = container("glu", EXPERTS)
    experts, _ = cached(resident, CHOSEN)
    x = inputs(resident, 1, 1, 0)
    choices = [chosen(1, 1, seed) for seed in range(8)]
    lazily = [experts(x, indices) for indices in choices]
    assert all(
        same(result, resident(x, indices)) for result, indices in zip(lazily, choices, strict=True)
    )


def test_nothing_of_a_pass_is_held_after_it() -> None:
    """As of the last layer's experts in a prefill, whose result nobody needs."""
    resident = container("glu", EXPERTS)
    experts, _ = cached(resident, EXPERTS)
    x, indices = inputs(resident, 1, 4096, 0), chosen(1, 4096, 0)
    mx.eval(x, indices)
    before = mx.get_active_memory()
    with current_pass(1, 4096, [4096]):
        out = experts(x, indices)
    del out
    size = x.nbytes + indices.nbytes
    del x, indices
    assert mx.get_active_memory() <= before - size


def test_containers_of_one_model_wait_for_each_other() -> None:
    """A graph through two containers, twice: the second pass overwrites both."""
    first, second = container("glu", EXPERTS, 1), container("glu", EXPERTS, 2)
    model = nn.Module()
    model.first, model.second = container("glu", EXPERTS, 1), container("glu", EXPERTS, 2)
    cache_experts(model, CHOSEN)

    def run(a: nn.Module, b: nn.Module, seed: int) -> mx.array:
        x = inputs(first, 2, 1, seed)
        hidden = a(x, chosen(2, 1, seed)).sum(axis=-2)
        return b(hidden, chosen(2, 1, seed + 1)).sum(axis=-2)

    lazily = [run(model.first, model.second, seed) for seed in range(5)]
    assert all(same(out, run(first, second, seed)) for seed, out in enumerate(lazily))


def test_a_container_with_all_experts_reads_nothing_back() -> None:
    resident = container("glu", EXPERTS)
    experts, source = cached(resident, EXPERTS + 3)
    experts.fill()
    assert experts.resident
    assert experts.slots == EXPERTS
    assert source.asked == [list(range(EXPERTS))]

    # A traced function must not evaluate anything.
    traced = mx.compile(lambda x, indices: experts(x, indices))
    x, indices = inputs(resident, 2, 3, 0), chosen(2, 3, 0)
    assert same(traced(x, indices), resident(x, indices))


def test_a_container_becomes_resident_once_all_experts_were_chosen() -> None:
    resident = container("glu", EXPERTS)
    experts, source = cached(resident, EXPERTS)
    x = inputs(resident, 1, 1, 0)
    for first in reversed(range(0, EXPERTS, CHOSEN)):
        assert not experts.resident
        indices = mx.array([[[first + 1, first]]], dtype=mx.uint32)
        assert same(experts(x, indices), resident(x, indices))
    assert experts.resident
    read = len(source.asked)
    for seed in range(4):
        assert same(experts(x, chosen(1, 1, seed)), resident(x, chosen(1, 1, seed)))
    assert len(source.asked) == read


def test_slots_are_no_parameters_and_other_children_are() -> None:
    resident = container("glu", EXPERTS)
    experts, source = cached(resident, 4)
    model = nn.Module()
    model.experts = experts
    assert tree_flatten(model.parameters()) == []
    assert experts.nbytes == 4 * source.nbytes
    assert "activation" in experts.children()
    assert not [path for path, _ in model.named_modules() if "proj" in path]

    # As in muse_spark, whose norm stands among the experts.
    resident.post_expert_norm = nn.RMSNorm(8)
    experts, _ = cached(resident, 4)
    assert [name for name, _ in tree_flatten(experts.parameters())] == ["post_expert_norm.weight"]


def test_graphs_that_are_only_built_read_nothing() -> None:
    resident = container("nvfp4, global scale", EXPERTS)
    experts, source = cached(resident, 2)
    with building_only():
        out = experts(inputs(resident, 2, 3, 0), chosen(2, 3, 0))
    assert (out.shape, out.dtype) == ((2, 3, CHOSEN, 64), mx.float32)
    assert source.asked == []


def test_padding_reads_no_expert() -> None:
    resident = container("glu", EXPERTS)
    rows, tokens, lengths = 3, 8, [8, 1, 3]
    for slots in SHARES:
        experts, source = cached(resident, slots)
        x, indices = inputs(resident, rows, tokens, 0), np.array(chosen(rows, tokens, 0))
        real = np.arange(tokens) < np.array(lengths)[:, None]
        indices[~real] = EXPERTS - 1
        indices[real] %= EXPERTS - 1  # Padding alone chooses the last expert.
        expected = resident(x, mx.array(indices))
        with current_pass(rows, tokens, lengths) as current:
            out = experts(x, mx.array(indices))
            mx.eval(out)
        assert not current.failed_rows
        assert not any(EXPERTS - 1 in asked for asked in source.asked)
        assert np.array_equal(np.array(out)[real], np.array(expected)[real])
        assert np.isfinite(np.array(out)).all()


def test_an_expert_that_cannot_be_read_fails_the_rows_that_need_it() -> None:
    resident = container("glu, biases", EXPERTS)
    rows, tokens, lengths = 4, 6, [6, 6, 2, 6]
    indices = np.array(chosen(rows, tokens, 0)) % (EXPERTS - 2)
    broken, other = EXPERTS - 1, EXPERTS - 2
    indices[1, 3, 0] = indices[3, 5, 1] = broken
    indices[3, 0, 0] = other
    indices[2, 4, 0] = broken  # In the padding.
    x = inputs(resident, rows, tokens, 0)
    expected = resident(x, mx.array(indices))
    for slots in SHARES:
        experts, source = cached(resident, slots)
        source.broken = {broken, other}
        for _ in range(2):  # Nothing of the half-read expert is there the second time.
            with current_pass(rows, tokens, lengths) as current:
                out = experts(x, mx.array(indices))
                mx.eval(out)
            assert set(current.failed_rows) == {1, 3}
            assert str(current.failed_rows[1]) == f"expert {broken} is torn"
            for row in (0, 2):
                assert np.array_equal(
                    np.array(out)[row, : lengths[row]], np.array(expected)[row, : lengths[row]]
                )
            assert np.isfinite(np.array(out)).all()
        # Once the file is whole again, the next pass reads it.
        source.broken = set()
        assert same(experts(x, mx.array(indices)), expected)


def test_a_pass_of_which_no_expert_can_be_read_has_a_result() -> None:
    resident = container("glu", EXPERTS)
    for slots in (2, 8):
        experts, source = cached(resident, slots)
        source.broken = set(range(EXPERTS))
        with current_pass(2, 3, [3, 3]) as current:
            out = experts(inputs(resident, 2, 3, 0), chosen(2, 3, 0))
            mx.eval(out)
        assert set(current.failed_rows) == {0, 1}
        assert not out.any()
        assert out.shape == (2, 3, CHOSEN, 64)


@pytest.mark.parametrize("slots", [2, 8])
def test_outside_a_pass_the_error_is_raised_and_the_next_call_is_right(slots: int) -> None:
    resident = container("glu", EXPERTS)
    experts, source = cached(resident, slots)
    x, indices = inputs(resident, 2, 3, 0), chosen(2, 3, 0)
    source.broken = {int(indices[1, 2, 1])}
    with pytest.raises(CheckpointFileError, match="torn"):
        experts(x, indices)
    source.broken = set()
    assert same(experts(x, indices), resident(x, indices))


@pytest.mark.parametrize("slots", SHARES)
def test_an_interrupted_read_leaves_no_expert_behind(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = container("glu", EXPERTS)
    experts, source = cached(resident, slots)
    x, indices = inputs(resident, 2, 10, 0), chosen(2, 10, 0)
    mx.eval(experts(x[:, :1], indices[:, :1]))

    def interrupted(asked: list[int], into: Any) -> Any:
        for view in into(asked[0]).values():
            view[:] = 0xFF
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(source, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experts(x, indices)
    assert same(experts(x, indices), resident(x, indices))


@pytest.mark.parametrize("slots", [2, 8])
def test_transformed_functions_are_refused_until_all_experts_are_resident(slots: int) -> None:
    resident = container("glu", EXPERTS)
    experts, _ = cached(resident, slots)
    x, indices = inputs(resident, 2, 9, 0), chosen(2, 9, 0)
    with pytest.raises(SettingError, match=r"mx\.compile and mx\.vmap do not allow"):
        mx.compile(lambda x, indices: experts(x, indices))(x, indices)
    with pytest.raises(SettingError, match=r"mx\.compile and mx\.vmap do not allow"):
        mx.vmap(lambda x, indices: experts(x, indices))(x, indices)
    with pytest.raises(SettingError, match="no gradient"):
        mx.eval(mx.grad(lambda x: experts(x, indices).sum())(x))
    assert same(experts(x, indices), resident(x, indices))

    experts, _ = cached(resident, EXPERTS)
    experts.fill()
    found, expected = (
        mx.grad(lambda x, part=part: part(x, indices).sum())(x) for part in (experts, resident)
    )
    assert same(found, expected)


def test_a_source_that_lacks_a_parameter_is_refused() -> None:
    resident = container("glu, biases", EXPERTS)
    _, source = cached(resident, 2)
    del source.specs["up_proj.bias"]
    with pytest.raises(LayoutError, match=r"model\.layers\.3\.mlp: .*up_proj\.bias"):
        CachedExperts(resident, source, 2, layer="model.layers.3.mlp")
