"""The requests of the worker that failed and have not ended yet.

A request fails by itself: its prompt has ids without a row, its logits are not finite, its
parameters leave no token, or vLLM's sampler raises an error for it. It keeps its place in the
batch, with parameters that disturb nobody, until the scheduler has ended it, which takes a step
more under async scheduling.
"""

from __future__ import annotations

from collections.abc import Iterable

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

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._failures

    def fail(self, request: Request, reason: str, *, taints_pages: bool) -> None:
        """Note and log a failure, unless the request has failed before."""
        if request.req_id in self._failures:
            return
        self._failures[request.req_id] = Failure(reason, taints_pages)
        request.params = HARMLESS
        logger.error("request %s ends with an error: %s", request.req_id, reason)

    def among(self, req_ids: Iterable[str]) -> dict[str, Failure]:
        """Return the failures of these requests."""
        return {req_id: self._failures[req_id] for req_id in req_ids if req_id in self._failures}

    def forget(self, req_ids: Iterable[str]) -> None:
        """Discard requests that ended."""
        for req_id in req_ids:
            self._failures.pop(req_id, None)
