"""Drafts by n-grams are those of vLLM's own proposer."""

from __future__ import annotations

import importlib
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.ngram import NgramDrafter

OF_VLLM = "vllm.v1.spec_decode.ngram_proposer"


@pytest.fixture(scope="module")
def vllm_drafts() -> Any:
    """vLLM's choice; its module decorates with numba, which changes no result."""

    def unchanged(*_args: Any, **_settings: Any) -> Callable[[Any], Any]:
        return lambda function: function

    numba = types.ModuleType("numba")
    for name in ("jit", "njit"):
        setattr(numba, name, unchanged)
    for name in ("get_num_threads", "set_num_threads", "prange"):
        setattr(numba, name, range)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numba", numba)
        patch.delitem(sys.modules, OF_VLLM, raising=False)
        module = importlib.import_module(OF_VLLM)
        sys.modules.pop(OF_VLLM)
    return module._find_longest_matched_ngram_and_propose_tokens


def make_request(prompt: list[int], output: list[int] | None = None, req_id: str = "r") -> Request:
    return Request(req_id, prompt, None, [], 0, output or [])


def test_the_choice_is_that_of_vllm(vllm_drafts: Any) -> None:
    draw = random.Random(0)
    proposals = 0
    for _ in range(3000):
        letters, length = draw.randint(1, 4), draw.randint(1, 40)
        tokens = [draw.randrange(letters) for _ in range(length)]
        min_n = draw.randint(1, 5)
        max_n, most = draw.randint(min_n, 7), draw.randint(1, 6)
        longest = length + draw.choice([0, 1, 2, 3, 50])
        want = vllm_drafts(np.asarray(tokens, dtype=np.int32), min_n, max_n, longest, most)
        cut = draw.randint(1, length)
        request = make_request(tokens[:cut], tokens[cut:])
        drafts = NgramDrafter(min_n, max_n, longest).propose([request], most)
        assert drafts == [want.tolist()], (tokens, min_n, max_n, longest, most)
        proposals += bool(drafts[0])
    assert 1000 < proposals < 2900  # Both kinds of answer were compared.


def test_contexts_that_grow_and_are_cut_are_followed(vllm_drafts: Any) -> None:
    draw = random.Random(1)
    drafter = NgramDrafter(1, 4, 600)
    requests = [make_request([draw.randrange(3) for _ in range(n)], [], f"r{n}") for n in (3, 90)]
    for _ in range(200):
        for request in requests:
            # The scheduler discards tokens, and others come in their place.
            del request.output[len(request.output) - min(draw.choice([0, 0, 0, 2]), 1) :]
            request.output += [draw.randrange(3) for _ in range(draw.randint(1, 4))]
        for request, drafts in zip(requests, drafter.propose(requests, 3), strict=True):
            tokens = np.asarray(request.tokens(0, request.num_tokens), dtype=np.int32)
            assert drafts == vllm_drafts(tokens, 1, 4, 600, 3).tolist()


def test_an_id_that_begins_again_has_its_own_context() -> None:
    drafter = NgramDrafter(2, 3, 100)
    first, second = ([1, 2, *ids, *[5] * 80, 1, 2] for ids in ([3, 4], [7, 8]))
    assert drafter.propose([make_request(first)], 2) == [[3, 4]]
    again = make_request(second)
    assert drafter.propose([again], 2) == [[7, 8]]
    drafter.forget("r")
    drafter.forget("r")
    assert drafter.propose([again], 2) == [[7, 8]]


def test_failed_requests_get_none() -> None:
    request = make_request([1, 2, 1, 2])
    request.failed = True
    assert NgramDrafter(1, 2, 100).propose([request, make_request([1, 2, 1, 2])], 1) == [[], [1]]


@pytest.mark.parametrize("sizes", [(0, 2), (3, 2)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="1 <= min_n <= max_n"):
        NgramDrafter(*sizes, 100)
