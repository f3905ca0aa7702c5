"""The error of a refused request, which vLLM's server answers with status 400.

vLLM's ``AsyncLLM`` lets its own client errors through and turns any other into status 500 with an
empty message. Users of ``LLM`` and of this package expect a ``ValueError``.
"""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError

from vllm_moe_compat.errors import RequestError


class InvalidRequestError(VLLMValidationError, RequestError):
    """A request that is refused before it is queued."""
