"""Drafts by n-grams: what followed the last tokens of a request where they stood before.

The choice is that of vLLM's ``NgramProposer``, whose module needs numba: of the n-grams that end
the context, ``min_n <= n <= max_n``, the longest that stands in it before; of its places the
earliest; of the tokens that follow there, as many as are asked for and as fit. Both may overlap
the end of the context.

A proposal compares the context with one token per n. The token ids of a request are kept in an
array that grows by doubling, 4 bytes per token and at most ``max_model_len`` of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_moe_compat.backend.step.batch import Request

# Tokens before the end of a known context that are read again, since a step may have replaced
# the last of them.
READ_AGAIN = 64


class _Context:
    """The token ids of one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._tokens = np.empty(0, dtype=np.int32)
        self._known = 0

    def tokens(self, longest: int) -> npt.NDArray[np.int32]:
        """Return the prompt and the output, ``[num_tokens]``."""
        count = self.request.num_tokens
        if count > len(self._tokens):
            grown = np.empty(max(count, min(2 * count, longest)), dtype=np.int32)
            grown[: self._known] = self._tokens[: self._known]
            self._tokens = grown
        start = max(0, min(self._known, count) - READ_AGAIN)
        self._tokens[start:count] = self.request.tokens(start, count - start)
        self._known = count
        return self._tokens[:count]


class NgramDrafter:
    """Proposes the tokens that followed the longest n-gram, where it stood first."""

    def __init__(self, min_n: int, max_n: int, max_model_len: int) -> None:
        """Make a drafter.

        Args:
            min_n: tokens that have to match.
            max_n: tokens that are compared.
            max_model_len: tokens that a request can have.
        """
        if not 1 <= min_n <= max_n:
            raise ValueError(f"n-grams of {min_n} to {max_n} tokens: 1 <= min_n <= max_n is needed")
        self.min_n, self.max_n, self.max_model_len = min_n, max_n, max_model_len
        self._contexts: dict[str, _Context] = {}

    def propose(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        """Return drafts for each request; see ``Drafter``."""
        return [self._of(request, most) for request in requests]

    def forget(self, req_id: str) -> None:
        """Let go of a request's context."""
        self._contexts.pop(req_id, None)

    def _of(self, request: Request, most: int) -> list[int]:
        most = min(most, self.max_model_len - request.num_tokens)
        if request.failed or most <= 0:
            return []
        context = self._contexts.get(request.req_id)
        # An id may begin again.
        if context is None or context.request is not request:
            context = self._contexts[request.req_id] = _Context(request)
        tokens = context.tokens(self.max_model_len)
        start = follows(tokens, self.min_n, self.max_n)
        return [] if start is None else tokens[start : start + most].tolist()


def follows(tokens: npt.NDArray[np.int32], min_n: int, max_n: int) -> int | None:
    """Return the position behind the earliest longest n-gram that also ends ``tokens``.

    Args:
        tokens: ``[N]``.
        min_n: tokens that have to match.
        max_n: tokens that are compared.

    Returns:
        A position below N, or None if no n-gram matches.
    """
    last = len(tokens) - 1
    # places[i]: whether the n-gram stands at i and ends before the end.
    places, found = np.ones(last + 1, dtype=np.bool_), 0
    for n in range(1, min(max_n, last) + 1):
        # An n-gram that stands at i has its last n - 1 tokens standing at i + 1.
        longer = places[1:] & (tokens[: last + 1 - n] == tokens[-n])
        if not longer.any():
            break
        places, found = longer, n
    return None if found < min_n else int(places.argmax()) + found
