"""From logits to tokens: who is drawn in MLX, and who by vLLM's own sampler.

In: logits ``[B, V]`` of the requests that sample in this step. Out: one token
each, and log-probabilities where asked for.

Plain requests, greedy or with nothing but temperature, top-k and top-p, are drawn
in MLX (``mlx_sampling``), in the evaluation of the forward pass; nothing of theirs
but tokens is copied. A request is plain if every other parameter has its default:
one that is unknown here is vLLM's business. So is every request with a seed.

The others are the first rows of the batch, and only these are copied. vLLM's
``InputBatch`` keeps what their parameters need (penalties, generators, logits
processors), its ``Sampler`` does the rest on the host, so that every parameter means
what it means elsewhere. A request joins that batch when it first samples: a prompt
that is computed in chunks draws nothing from a seeded generator before its end.

What MLX draws depends on the engine's seed and on the number of the step, so that,
as with vLLM's sampler, the same requests in the same order get the same answers.
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
from vllm_moe_compat.backend.step.mlx_sampling import Draw, Wish
from vllm_moe_compat.backend.vllm import bridge as vllm_bridge

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

HOST = torch.device("cpu")

# What the package's own drawing heeds, and what changes nothing about a draw.
HEEDED = frozenset({"temperature", "top_k", "top_p", "min_tokens"})
HARMLESS = frozenset(
    {
        # how many answers, of what length, in which form
        *("n", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "repetition_detection"),
        *("_eos_token_id", "_all_stop_token_ids", "output_kind", "stream_interval"),
        *("detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
        *("include_stop_str_in_output", "output_text_buffer_length", "flat_logprobs"),
        # the prompt's, which prefills see to
        *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
        # the engine's own
        *("skip_clone", "skip_reading_prefix_cache", "routed_experts_prompt_start"),
        "_watermarking_skipped",
    }
)
# What vLLM itself writes in place of a default where it has nothing to do.
RESOLVED = {"watermarking": False}
DEFAULTS = SamplingParams()
HAS_TO_BE_DEFAULT = tuple(
    name for name in DEFAULTS.__struct_fields__ if name not in HEEDED | HARMLESS
)


def to_torch(logits: mx.array) -> torch.Tensor:
    """Evaluated logits as a float32 tensor that the sampler may write into."""
    return torch.from_numpy(np.array(logits.astype(mx.float32)))


def is_plain(params: SamplingParams) -> bool:
    """Whether nothing but temperature, top-k, top-p and min-tokens is asked for."""
    return all(
        getattr(params, name) == getattr(DEFAULTS, name)
        or (name in RESOLVED and getattr(params, name) == RESOLVED[name])
        for name in HAS_TO_BE_DEFAULT
    )


def _wish(params: SamplingParams) -> Wish:
    if params.sampling_type == SamplingType.GREEDY:
        return Wish()
    return Wish(params.temperature, max(params.top_k, 0), params.top_p)


class TokenSampler:
    """Both ways to draw, and the state that vLLM's sampler needs of each request."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        model = vllm_config.model_config
        scheduler = vllm_config.scheduler_config
        self.max_model_len = model.max_model_len
        self.vocab_size = model.get_vocab_size()
        self.logprobs_mode = model.logprobs_mode
        self.sampler = Sampler(logprobs_mode=model.logprobs_mode)
        self.batch = InputBatch(
            max_num_reqs=scheduler.max_num_seqs,
            max_model_len=model.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            device=HOST,
            vocab_size=self.vocab_size,
            # Blocks are our own business; the batch insists on one table.
            **vllm_bridge.batch_blocks([16]),
            logitsprocs=build_logitsprocs(
                vllm_config, HOST, False, False, model.logits_processors or ()
            ),
            logitsprocs_need_output_token_ids=bool(model.logits_processors),
            reasoning_config=getattr(vllm_config, "reasoning_config", None),
        )
        self.states: dict[str, CachedRequestState] = {}
        # Someone else's processor may change any request's logits.
        self._own_processors = any(
            not type(one).__module__.startswith("vllm.v1.sample.")
            for one in self.batch.logitsprocs.all
        )
        self._plain: dict[str, bool] = {}
        self._drawn: list[Request] = []  # the plain rows, which follow the others
        self._draw = Draw([], self.vocab_size)
        self._seed, self._steps = model.seed or 0, 0
        self._prompt_logprobs: dict[str, LogprobsTensors] = {}

    def forget(self, req_ids: set[str]) -> None:
        """Forget requests that ended."""
        for req_id in req_ids:
            self.states.pop(req_id, None)
            self._plain.pop(req_id, None)
            self._prompt_logprobs.pop(req_id, None)
            self.batch.remove_request(req_id)

    def select(self, requests: Sequence[Request]) -> list[str]:
        """Make ``requests`` the batch that samples; return their ids in its order."""
        plain, others = [], {}
        for request in requests:
            if self._is_plain(request):
                plain.append(request)
            else:
                others[request.req_id] = request
        self._select_drawn(plain)
        for req_id in list(self.batch.req_id_to_index):
            if req_id not in others:
                self.batch.remove_request(req_id)
        for req_id, request in others.items():
            if req_id not in self.batch.req_id_to_index:
                self.batch.add_request(self._state(request))
        self.batch.condense()
        self.batch.refresh_metadata()
        return [*self.batch.req_ids, *(request.req_id for request in self._drawn)]

    def _is_plain(self, request: Request) -> bool:
        plain = self._plain.get(request.req_id)
        if plain is None:
            plain = not self._own_processors and is_plain(request.params)
            self._plain[request.req_id] = plain
        return plain and len(request.output) >= request.params.min_tokens

    def _select_drawn(self, requests: list[Request]) -> None:
        """Keep who was drawn before in the same order, so that states need not move."""
        before = {request.req_id: place for place, request in enumerate(self._drawn)}
        last = len(before)
        requests.sort(key=lambda request: before.get(request.req_id, last))
        if len(requests) != last or any(
            a is not b for a, b in zip(requests, self._drawn, strict=True)
        ):
            self._drawn = requests
            self._draw = Draw([_wish(request.params) for request in requests], self.vocab_size)

    @property
    def draws_all(self) -> bool:
        """Whether every row of the batch is drawn in MLX."""
        return not self.batch.req_id_to_index

    def draw(self, logits: mx.array) -> mx.array | None:
        """Tokens of the plain rows of ``logits [B, V]``, lazy; None if there are none."""
        if not self._drawn:
            return None
        self._steps += 1
        return self._draw(logits[len(logits) - len(self._drawn) :], self._key(0))

    def _key(self, use: int) -> mx.array:
        """A key for one use in this step; no other step or use has the same."""
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
                # The same list: what we append, the sampler's penalties see.
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
        """Sample one token for each row of ``logits [B, V]`` and append it.

        ``drawn``: what ``draw`` made of them, evaluated.
        """
        tokens: list[int] = []
        logprobs = None
        others = len(self.batch.req_id_to_index)
        if others:
            tokens, logprobs = self._sample_on_host(logits[:others], scheduler_output, grammar)
        if drawn is not None:
            own: list[int] = drawn.tolist()  # type: ignore[assignment]
            if min(own) < 0:
                own = self._draw.settle(logits[others:], own, self._key(1))
            for request, token in zip(self._drawn, own, strict=True):
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
        """Note the log-probabilities of the prompt tokens after ``start``.

        ``logits [T, V]`` are those of the tokens from ``start`` on; token
        ``i``'s logits score token ``i + 1``.
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
        ids, values, ranks, *_ = self.sampler.gather_logprobs(scores, number, targets)
        rows = slice(start, start + count)
        kept.logprob_token_ids[rows].copy_(ids)
        kept.logprobs[rows].copy_(values)
        kept.selected_token_ranks[rows].copy_(ranks)

    def finished_prompt(self, req_id: str) -> LogprobsTensors | None:
        """The log-probabilities of a prompt that is now complete, once."""
        return self._prompt_logprobs.pop(req_id, None)
