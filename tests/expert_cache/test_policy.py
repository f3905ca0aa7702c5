"""The policy against slots kept naively, and what it promises whatever is wanted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.expert_slots import Slots
from vllm_moe_compat.expert_cache.policy import HALF_LIFE, Policy

EXPERTS = 24


def as_arrays(uses: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    wanted = sorted(uses)
    return np.array(wanted, np.int64), np.array([uses[expert] for expert in wanted], np.int64)


passes = st.lists(
    st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 9), min_size=1, max_size=EXPERTS),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60)
@given(
    slots=st.integers(1, EXPERTS),
    half_life=st.sampled_from([1 / 64, 2, HALF_LIFE, 1e6]),
    flowing=st.sampled_from([0.1, 0.5, 1]),
    trace=passes,
)
def test_groups_are_those_of_slots_kept_naively(slots, half_life, flowing, trace):
    policy = Policy(slots, EXPERTS, half_life=half_life, flowing=flowing)
    naive = Slots(slots, half_life, flowing)
    for uses in trace:
        groups = policy.plan(*as_arrays(uses))
        found = [
            (set(group.experts.tolist()), [expert for expert, _ in group.missing])
            for group in groups
        ]
        assert found == naive.run(uses)
        assert {s: e for s, e in enumerate(policy.expert_of.tolist()) if e >= 0} == naive.held


@settings(max_examples=60)
@given(slots=st.integers(1, EXPERTS), trace=passes, drops=st.sets(st.integers(0, EXPERTS - 1)))
def test_every_expert_lies_in_its_slot_when_its_group_is_computed(slots, trace, drops):
    policy = Policy(slots, EXPERTS)
    content: dict[int, int] = {}
    for uses in trace:
        wanted, counts = as_arrays(uses)
        before = set(content.values())
        groups = policy.plan(wanted, counts)
        read = []
        for group in groups:
            assert len(group.experts) <= slots
            for expert, slot in group.missing:
                content[slot] = expert
                read.append(expert)
            assert [content[slot] for slot in group.slots.tolist()] == group.experts.tolist()
        # Each once, and none that was there.
        assert sorted(e for group in groups for e in group.experts.tolist()) == wanted.tolist()
        assert sorted(read) == sorted(set(wanted.tolist()) - before)
        for expert in drops & set(read):
            policy.forget(expert)
            content = {slot: held for slot, held in content.items() if held != expert}
    assert {s: e for s, e in enumerate(policy.expert_of.tolist()) if e >= 0} == content


def test_priority_is_uses_that_halve_with_age():
    policy = Policy(2, 3)
    used = [{0: 4}, {1: 1}, {0: 1, 1: 9}, *[{2: 1}] * 40, {1: 2}]
    for uses in used:
        policy.plan(*as_arrays(uses))
    now = len(used)
    for expert in range(3):
        expected = sum(
            math.sqrt(uses.get(expert, 0)) * 2 ** ((time - now) / HALF_LIFE)
            for time, uses in enumerate(used, 1)
        )
        assert policy.priority[expert] == pytest.approx(math.log2(expected) + now / HALF_LIFE)


def test_a_prefill_leaves_what_decode_uses_most():
    policy = Policy(8, 64)
    for _ in range(4):
        policy.plan(np.arange(8))
    groups = policy.plan(np.arange(64), np.full(64, 5))
    assert len(groups) == 1 + 56 // 4
    assert set(range(4)) <= set(policy.expert_of.tolist())
    # Whatever was read last is there, too: no slot is empty.
    assert (policy.expert_of >= 0).all()


def test_an_expert_that_could_not_be_read_is_missing_again():
    policy = Policy(4, 8)
    policy.plan(np.array([1, 2]))
    policy.forget(2)
    policy.forget(7)
    (group,) = policy.plan(np.array([1, 2]))
    assert [expert for expert, _ in group.missing] == [2]


def test_a_policy_without_slots_is_refused():
    with pytest.raises(ValueError, match="got 0 and 8"):
        Policy(0, 8)
