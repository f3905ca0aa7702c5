"""Sampling: tokens drawn in MLX for plain requests, and by vLLM's own sampler for all others.

A request is plain if it is greedy or sets nothing but temperature, top-k and top-p; every other
parameter must have its default, also one that is unknown here. Plain requests are drawn in MLX
(``step.mlx_sampling``), in the evaluation of the forward pass, and only their tokens are copied.

The other requests, among them all with a seed, are the first rows of the batch, and only their
logits ``[B', V]`` are copied to the host, where vLLM's sampler draws (``host_sampling``).

A request with drafts has ``1 + drafts`` rows, and gets as many tokens as its drafts are right, and
one more (``verified_sampling``). For plain requests all rows are drawn at once, since a draw in MLX
depends on nothing but its row.

A row whose logits are not finite gives no token, and its request fails alone.

Draws in MLX depend on the engine's seed and the number of the step, so, as with vLLM's sampler,
the same requests in the same order give the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import torch
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from vllm_moe_compat.backend.model.rows import TokenRows
from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.mlx_sampling import (
    NO_TOKEN,
    UNDECIDED,
    BatchSampler,
    SamplingRequest,
)
from vllm_moe_compat.backend.vllm import bridge
from vllm_moe_compat.backend.vllm.failed_requests import NOT_FINITE, FailedRequests
from vllm_moe_compat.backend.vllm.host_sampling import HostSampler, as_wide_as
from vllm_moe_compat.backend.vllm.verified_sampling import (
    accepts_last,
    count_rows,
    verify_on_host,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

# Parameters that sampling in MLX applies. ``min_tokens`` makes a request plain only once enough
# tokens exist.
APPLIED_FIELDS = frozenset({"temperature", "top_k", "top_p", "min_tokens"})
DEFAULTS = SamplingParams()
DEFAULT_ONLY_FIELDS = tuple(
    name
    for name in DEFAULTS.__struct_fields__
    if name not in APPLIED_FIELDS | bridge.NEUTRAL_SAMPLING_FIELDS
)


def to_torch(logits: mx.array) -> torch.Tensor:
    """Copy logits to a float32 tensor that the sampler may write into."""
    return torch.from_numpy(np.array(logits.astype(mx.float32)))


def is_plain(params: SamplingParams) -> bool:
    """Return whether only temperature, top-k, top-p and min-tokens are set."""
    resolved = bridge.RESOLVED_SAMPLING_FIELDS
    return all(
        getattr(params, name) == getattr(DEFAULTS, name)
        or (name in resolved and getattr(params, name) == resolved[name])
        for name in DEFAULT_ONLY_FIELDS
    )


def _sampling_request(params: SamplingParams, vocab_size: int) -> SamplingRequest:
    if params.sampling_type == SamplingType.GREEDY:
        return SamplingRequest()
    # A larger k keeps all, and might not fit an array.
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    return SamplingRequest(params.temperature, top_k, params.top_p)


class TokenSampler:
    """Samples a batch in MLX and with vLLM's sampler.

    Attributes:
        rows: ids that the model has rows for.
        failed: requests that failed and have not ended.
    """

    def __init__(self, vllm_config: VllmConfig, rows: TokenRows) -> None:
        model = vllm_config.model_config
        self.rows, self.failed = rows, FailedRequests()
        self._host = HostSampler(vllm_config, self.failed)
        self.max_model_len, self.vocab_size = self._host.max_model_len, self._host.vocab_size
        # Columns beyond vLLM's vocabulary are not drawn.
        self._columns = min(rows.head, self.vocab_size)
        self.logprobs_mode = model.logprobs_mode
        self._plain: dict[str, bool] = {}
        # Plain requests of the current batch; their rows follow those of the others.
        self._plain_requests: list[Request] = []
        # Of the rows of the plain requests, each of which has as many as this says.
        self._mlx_sampler, self._plain_rows = BatchSampler([], self._columns), list[int]()
        # Request id → number of tokens that it got in the last step.
        self._drawn: dict[str, int] = {}
        self._seed, self._steps = model.seed or 0, 0
        self._prompt_logprobs: dict[str, LogprobsTensors] = {}

    def forget(self, req_ids: set[str]) -> None:
        """Discard the state of requests that ended."""
        for req_id in req_ids:
            self._plain.pop(req_id, None)
            self._prompt_logprobs.pop(req_id, None)
            self._host.forget(req_id)

    def select(self, requests: Sequence[Request]) -> list[str]:
        """Make ``requests`` the batch that samples; return their ids in the order of its rows."""
        self._host.select([request for request in requests if not self._is_plain(request)])
        self._select_plain([request for request in requests if self._is_plain(request)])
        return [request.req_id for request in [*self._host.requests, *self._plain_requests]]

    def _is_plain(self, request: Request) -> bool:
        if request.req_id in self.failed:
            return True
        plain = self._plain.get(request.req_id)
        if plain is None:
            plain = not self._host.has_foreign_processors and is_plain(request.params)
            self._plain[request.req_id] = plain
        return plain and len(request.output) >= request.params.min_tokens

    def _select_plain(self, requests: list[Request]) -> None:
        """Keep the order of the last step, so that resident states need not be regrouped."""
        before = {request.req_id: row for row, request in enumerate(self._plain_requests)}
        last = len(before)
        requests.sort(key=lambda request: before.get(request.req_id, last))
        if len(requests) != last or any(
            a is not b for a, b in zip(requests, self._plain_requests, strict=True)
        ):
            self._plain_requests, self._plain_rows = requests, []

    @property
    def draws_all(self) -> bool:
        """Whether every row of the batch is drawn in MLX."""
        return not self._host.batch.req_id_to_index

    def draw(self, logits: mx.array) -> mx.array | None:
        """Return tokens of the plain rows of ``logits [R, V]``, not evaluated; None without any.

        R is the sum of ``1 + drafts`` over the requests.
        """
        if not self._plain_requests:
            return None
        self._steps += 1
        rows = [1 + len(request.drafts) for request in self._plain_requests]
        if rows != self._plain_rows:
            self._plain_rows = rows
            kinds = [_sampling_request(one.params, self._columns) for one in self._plain_requests]
            self._mlx_sampler = BatchSampler(
                [kind for kind, count in zip(kinds, rows, strict=True) for _ in range(count)],
                self._columns,
            )
        first = len(logits) - sum(rows)
        return self._mlx_sampler(self._drawable(logits[first:]), self._key(0))

    def _drawable(self, logits: mx.array) -> mx.array:
        return logits if logits.shape[-1] == self._columns else logits[..., : self._columns]

    def _key(self, use: int) -> mx.array:
        """Return a random key that is unique to this step and ``use``."""
        words = [self._seed & 0xFFFFFFFF, (2 * self._steps + use) & 0xFFFFFFFF]
        return mx.array(words, dtype=mx.uint32)

    def sample(
        self,
        logits: mx.array,
        drawn: mx.array | None,
        scheduler_output: SchedulerOutput,
        grammar: GrammarOutput | None,
    ) -> tuple[list[str], list[list[int]], LogprobsLists | None]:
        """Sample the tokens of a step and append them to their requests.

        Args:
            logits: ``[R, V]``, ``1 + drafts`` rows for each request, in the order that ``select``
                returned.
            drawn: evaluated result of ``draw`` for the same logits.
            scheduler_output: of the step.
            grammar: the step's masks of structured output.

        Returns:
            The ids of the requests, those with log-probabilities first; the tokens of each, none
            for a request that failed; log-probabilities.
        """
        order: list[str] = []
        tokens: list[list[int]] = []
        logprobs = None
        logits = self._drawable(logits)
        requests = [*self._host.requests, *self._plain_requests]
        before = [len(request.output) for request in requests]
        others = count_rows(self._host.requests)
        if others:

            def copy_rows(rows: list[int]) -> torch.Tensor:
                whole = rows == list(range(others))
                return to_torch(logits[:others] if whole else logits[mx.array(rows)])

            order, tokens, logprobs = verify_on_host(
                self._host, copy_rows, scheduler_output, grammar
            )
        if drawn is not None:
            order += [request.req_id for request in self._plain_requests]
            tokens += self._verify_plain(logits[others:], drawn.tolist())  # type: ignore[arg-type]
        self._drawn = {
            request.req_id: len(request.output) - count
            for request, count in zip(requests, before, strict=True)
        }
        return order, tokens, logprobs

    def verify(
        self,
        logits: mx.array,
        scheduler_output: SchedulerOutput,
        grammar: GrammarOutput | None,
    ) -> tuple[list[str], list[list[int]], LogprobsLists | None]:
        """Sample as ``sample`` does, where plain rows have not been drawn with the logits."""
        return self.sample(logits, self.draw(logits), scheduler_output, grammar)

    def _verify_plain(self, logits: mx.array, drawn: list[int]) -> list[list[int]]:
        """Return the tokens of each plain request, from those drawn of all their rows."""
        tokens: list[list[int]] = []
        key, start = self._key(1), 0
        for request in self._plain_requests:
            own: list[int] = []
            for position, row in enumerate(range(start, start + 1 + len(request.drafts))):
                token = drawn[row]
                if token == UNDECIDED:
                    key, own_key = mx.random.split(key)
                    token = self._mlx_sampler.draw_row(logits, row, own_key)
                if token == NO_TOKEN:
                    if position:
                        break
                    self.failed.fail(request, NOT_FINITE, taints_pages=True)
                request.output.append(max(token, 0))
                own.append(token)
                if request.failed or not accepts_last(request, position, self.max_model_len):
                    break
            start += 1 + len(request.drafts)
            tokens.append([] if request.req_id in self.failed else own)
        return tokens

    def replace(self, request: Request, tokens: Sequence[int]) -> None:
        """Replace the tokens that a request got in the last step."""
        count = self._drawn[request.req_id]
        self._drawn[request.req_id] = len(tokens)
        request.output[len(request.output) - count :] = tokens
        self._host.replace(request.req_id, count, tokens)

    def score_prompt(self, request: Request, start: int, logits: mx.array) -> None:
        """Record the log-probabilities of the prompt tokens after ``start``.

        ``logits [T, V]`` are those of the tokens from ``start`` on; the logits of token ``i``
        score token ``i + 1``. A request without finite logits fails.
        """
        params, prompt = request.params, request.prompt
        count = min(logits.shape[0], len(prompt) - 1 - start)
        if count <= 0:
            return
        number = self.vocab_size if params.prompt_logprobs == -1 else params.prompt_logprobs
        kept = self._prompt_logprobs.get(request.req_id)
        if kept is None:
            kept = LogprobsTensors.empty_cpu(len(prompt) - 1, number + 1)
            self._prompt_logprobs[request.req_id] = kept
        scores = as_wide_as(to_torch(self._drawable(logits[:count])), self.vocab_size)
        if not scores.max(dim=-1).values.isfinite().all():
            self.failed.fail(request, NOT_FINITE, taints_pages=True)
            return
        if self.logprobs_mode not in ("raw_logits", "processed_logits"):
            scores = self._host.sampler.compute_logprobs(scores)
        targets = torch.tensor(prompt[start + 1 : start + 1 + count])
        found = self._host.sampler.gather_logprobs(scores, number, targets)
        rows = slice(start, start + count)
        kept.logprob_token_ids[rows].copy_(found.logprob_token_ids)
        kept.logprobs[rows].copy_(found.logprobs)
        kept.selected_token_ranks[rows].copy_(found.selected_token_ranks)

    def finished_prompt(self, req_id: str) -> LogprobsTensors | None:
        """Return the log-probabilities of a complete prompt, and discard them."""
        return self._prompt_logprobs.pop(req_id, None)
