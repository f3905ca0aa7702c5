"""Sampling: tokens drawn in MLX for plain requests, and by vLLM's own sampler for all others.

A request is plain if it is greedy or sets nothing but temperature, top-k and top-p; every other
parameter must have its default, also one that is unknown here. Plain requests are drawn in MLX
(``step.mlx_sampling``), in the evaluation of the forward pass, and only their tokens are copied.

The other requests, among them all with a seed, are the first rows of the batch, and only their
logits ``[B', V]`` are copied to the host. vLLM's ``InputBatch`` keeps the state that their
parameters need (penalties, generators, logits processors) and its ``Sampler`` draws, so every
parameter has vLLM's meaning. A request joins that batch when it first samples: a prompt computed
in chunks draws nothing from a seeded generator before its end.

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
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.sample.sampler import Sampler
from vllm.v1.structured_output.utils import apply_grammar_bitmask
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.mlx_sampling import BatchSampler, SamplingRequest
from vllm_moe_compat.backend.vllm import bridge

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

HOST = torch.device("cpu")

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


def _sampling_request(params: SamplingParams) -> SamplingRequest:
    if params.sampling_type == SamplingType.GREEDY:
        return SamplingRequest()
    return SamplingRequest(params.temperature, max(params.top_k, 0), params.top_p)


class TokenSampler:
    """Samples a batch in MLX and with vLLM's sampler, and keeps that sampler's state."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        model = vllm_config.model_config
        scheduler = vllm_config.scheduler_config
        self.max_model_len = model.max_model_len
        self.vocab_size = model.get_vocab_size()
        self.logprobs_mode = model.logprobs_mode
        bridge.sample_without_triton()
        self.sampler = Sampler(logprobs_mode=model.logprobs_mode)
        self.batch = InputBatch(
            max_num_reqs=scheduler.max_num_seqs,
            max_model_len=model.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            device=HOST,
            vocab_size=self.vocab_size,
            # The backend addresses blocks itself, but the batch requires a table.
            **bridge.input_batch_blocks([16]),
            logitsprocs=build_logitsprocs(
                vllm_config, HOST, False, False, model.logits_processors or ()
            ),
            logitsprocs_need_output_token_ids=bool(model.logits_processors),
            reasoning_config=bridge.reasoning_config(vllm_config),
        )
        self.states: dict[str, CachedRequestState] = {}
        # A logits processor from outside vLLM may change the logits of any request.
        self._foreign_processors = any(
            not type(one).__module__.startswith("vllm.v1.sample.")
            for one in self.batch.logitsprocs.all
        )
        self._plain: dict[str, bool] = {}
        # Plain requests of the current batch; their rows follow those of the others.
        self._plain_requests: list[Request] = []
        self._mlx_sampler = BatchSampler([], self.vocab_size)
        self._seed, self._steps = model.seed or 0, 0
        self._prompt_logprobs: dict[str, LogprobsTensors] = {}

    def forget(self, req_ids: set[str]) -> None:
        """Discard the state of requests that ended."""
        for req_id in req_ids:
            self.states.pop(req_id, None)
            self._plain.pop(req_id, None)
            self._prompt_logprobs.pop(req_id, None)
            self.batch.remove_request(req_id)

    def select(self, requests: Sequence[Request]) -> list[str]:
        """Make ``requests`` the batch that samples; return their ids in the order of its rows."""
        plain, others = [], {}
        for request in requests:
            if self._is_plain(request):
                plain.append(request)
            else:
                others[request.req_id] = request
        self._select_plain(plain)
        for req_id in list(self.batch.req_id_to_index):
            if req_id not in others:
                self.batch.remove_request(req_id)
        for req_id, request in others.items():
            if req_id not in self.batch.req_id_to_index:
                self.batch.add_request(self._state(request))
        self.batch.condense()
        self.batch.refresh_metadata()
        return [*self.batch.req_ids, *(request.req_id for request in self._plain_requests)]

    def _is_plain(self, request: Request) -> bool:
        plain = self._plain.get(request.req_id)
        if plain is None:
            plain = not self._foreign_processors and is_plain(request.params)
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
            self._plain_requests = requests
            self._mlx_sampler = BatchSampler(
                [_sampling_request(request.params) for request in requests], self.vocab_size
            )

    @property
    def draws_all(self) -> bool:
        """Whether every row of the batch is drawn in MLX."""
        return not self.batch.req_id_to_index

    def draw(self, logits: mx.array) -> mx.array | None:
        """Return tokens of the plain rows of ``logits [B, V]``, not evaluated; None without any."""
        if not self._plain_requests:
            return None
        self._steps += 1
        first = len(logits) - len(self._plain_requests)
        return self._mlx_sampler(logits[first:], self._key(0))

    def _key(self, use: int) -> mx.array:
        """Return a random key that is unique to this step and ``use``."""
        words = [self._seed & 0xFFFFFFFF, (2 * self._steps + use) & 0xFFFFFFFF]
        return mx.array(words, dtype=mx.uint32)

    def _state(self, request: Request) -> CachedRequestState:
        state = self.states.get(request.req_id)
        if state is None:
            params, generator = request.params, None
            if params.sampling_type == SamplingType.RANDOM_SEED:
                generator = torch.Generator(device=HOST)
                generator.manual_seed(params.seed)
            state = CachedRequestState(
                req_id=request.req_id,
                prompt_token_ids=request.prompt,
                mm_features=[],
                sampling_params=params,
                generator=generator,
                block_ids=([],),
                num_computed_tokens=0,
                # The same list object, so that penalties see the tokens that we append.
                output_token_ids=request.output,
            )
            self.states[request.req_id] = state
        return state

    def sample(
        self,
        logits: mx.array,
        drawn: mx.array | None,
        scheduler_output: SchedulerOutput,
        grammar: GrammarOutput | None,
    ) -> tuple[list[int], LogprobsLists | None]:
        """Sample one token for each row of ``logits [B, V]`` and append it to its request.

        ``drawn``: evaluated result of ``draw`` for the same logits.
        """
        tokens: list[int] = []
        logprobs = None
        others = len(self.batch.req_id_to_index)
        if others:
            tokens, logprobs = self._sample_on_host(logits[:others], scheduler_output, grammar)
        if drawn is not None:
            own: list[int] = drawn.tolist()  # type: ignore[assignment]
            if min(own) < 0:
                own = self._mlx_sampler.draw_undecided(logits[others:], own, self._key(1))
            for request, token in zip(self._plain_requests, own, strict=True):
                request.output.append(token)
            tokens += own
        return tokens, logprobs

    def _sample_on_host(
        self, logits: mx.array, scheduler_output: SchedulerOutput, grammar: GrammarOutput | None
    ) -> tuple[list[int], LogprobsLists | None]:
        scores = to_torch(logits)
        if grammar is not None:
            apply_grammar_bitmask(scheduler_output, grammar, self.batch, scores)
        with torch.no_grad():
            result = self.sampler(logits=scores, sampling_metadata=self.batch.sampling_metadata)
        tokens = result.sampled_token_ids.flatten().tolist()
        for row, token in enumerate(tokens):
            end = int(self.batch.num_tokens_no_spec[row])
            if end < self.max_model_len:
                self.batch.token_ids_cpu[row, end] = token
                self.batch.is_token_ids[row, end] = True
            self.batch.num_tokens_no_spec[row] = end + 1
            self.states[self.batch.req_ids[row]].output_token_ids.append(token)
        logprobs = result.logprobs_tensors
        return tokens, None if logprobs is None else logprobs.tolists()

    def score_prompt(self, request: Request, start: int, logits: mx.array) -> None:
        """Record the log-probabilities of the prompt tokens after ``start``.

        ``logits [T, V]`` are those of the tokens from ``start`` on; the logits of token ``i``
        score token ``i + 1``.
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
        scores = to_torch(logits[:count])
        if self.logprobs_mode not in ("raw_logits", "processed_logits"):
            scores = self.sampler.compute_logprobs(scores)
        targets = torch.tensor(prompt[start + 1 : start + 1 + count])
        found = self.sampler.gather_logprobs(scores, number, targets)
        rows = slice(start, start + count)
        kept.logprob_token_ids[rows].copy_(found.logprob_token_ids)
        kept.logprobs[rows].copy_(found.logprobs)
        kept.selected_token_ranks[rows].copy_(found.selected_token_ranks)

    def finished_prompt(self, req_id: str) -> LogprobsTensors | None:
        """Return the log-probabilities of a complete prompt, and discard them."""
        return self._prompt_logprobs.pop(req_id, None)
