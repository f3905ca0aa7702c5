"""The requests of the worker that failed and have not ended yet.

A request fails by itself: its prompt has ids without a row, its logits are not finite, its
parameters leave no token, vLLM's sampler raises an error for it, or an expert that it needs cannot
be read. It keeps its place in the batch, with parameters that disturb nobody, until the scheduler
has ended it, which takes a step more under async scheduling.

Its pages may be wrong from some token on. vLLM counts a page as cached as soon as it is scheduled,
so another request may have started behind such pages before the scheduler hears of the failure.
Such a request fails, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.sampling_params import SamplingParams

from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.vllm.step_output import Failure
from vllm_moe_compat.log import logger

HARMLESS = SamplingParams(temperature=0)
NOT_FINITE = "the model's logits are NaN or infinite; the weights overflow, or hold such values"


class FailedRequests:
    """Failures by request id."""

    def __init__(self) -> None:
        self._failures: dict[str, Failure] = {}
        # Failed requests whose pages are tainted, each with the first token of which they are.
        self._tainted: dict[str, tuple[Request, int]] = {}

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._failures

    def fail(
        self, request: Request, reason: str, *, taints_pages: bool, since: int | None = None
    ) -> None:
        """Note and log a failure, unless the request has failed before.

        Args:
            request: keeps its place in the batch.
            reason: one sentence.
            taints_pages: its pages may hold NaN, or values of other tokens.
            since: the first token of which they may; None for the first one of this step.
        """
        if request.req_id in self._failures:
            return
        pages: frozenset[int] = frozenset()
        if taints_pages:
            pages = frozenset(block for group in request.blocks for block in group)
            self._tainted[request.req_id] = request, request.computed if since is None else since
        self._failures[request.req_id] = Failure(reason, pages)
        request.params, request.failed = HARMLESS, True
        logger.error("request %s ends with an error: %s", request.req_id, reason)

    def spread(
        self,
        started: Sequence[Request],
        block_sizes: Sequence[int],
        copies: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Fail the requests among ``started`` whose cached prefix has tainted pages.

        Args:
            started: requests that start in this step behind a cached prefix.
            block_sizes: tokens per block, by KV group.
            copies: (source, destination) of blocks copied before this step.
        """
        copied = list(copies)
        sound = [request for request in started if request.req_id not in self._failures]
        while sound and self._tainted:
            reasons = self._tainted_pages(block_sizes)
            for source, copy in copied:
                if source in reasons:
                    reasons.setdefault(copy, reasons[source])
            reached = []
            for request in sound:
                prefix = _blocks(request, block_sizes, 0, request.computed)
                reason = next((reasons[block] for block in prefix if block in reasons), None)
                if reason is not None:
                    self.fail(request, reason, taints_pages=True)
                    reached.append(request)
            if not reached:
                return
            sound = [request for request in sound if not request.failed]

    def _tainted_pages(self, block_sizes: Sequence[int]) -> dict[int, str]:
        """Map tainted blocks to the reasons."""
        return {
            block: self._failures[req_id].reason
            for req_id, (request, since) in self._tainted.items()
            for block in _blocks(request, block_sizes, since, None)
        }

    def among(self, req_ids: Iterable[str]) -> dict[str, Failure]:
        """Return the failures of these requests."""
        return {req_id: self._failures[req_id] for req_id in req_ids if req_id in self._failures}

    def forget(self, req_ids: Iterable[str]) -> None:
        """Discard requests that ended."""
        for req_id in req_ids:
            self._failures.pop(req_id, None)
            self._tainted.pop(req_id, None)


def _blocks(request: Request, block_sizes: Sequence[int], start: int, end: int | None) -> list[int]:
    """Return the blocks with tokens ``start`` to ``end`` (None: all); not vLLM's null block."""
    return [
        block
        for group, size in zip(request.blocks, block_sizes, strict=True)
        for block in group[start // size : None if end is None else -(-end // size)]
        if block
    ]
