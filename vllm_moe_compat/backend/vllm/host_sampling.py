"""Sampling by vLLM's own sampler, on the host.

vLLM's ``InputBatch`` keeps the state that parameters need (penalties, generators, logits
processors) and its ``Sampler`` draws, so every parameter has vLLM's meaning. A request joins the
batch when it first samples: a prompt computed in chunks draws nothing from a seeded generator
before its end.

A step may draw several tokens for a request (``verified_sampling``). It does so position by
position; the batch stays whole, and rows for which nothing is drawn at a position keep their state.

vLLM's code works on the whole batch. If it raises an error, each request is tried alone, those
that fail alone are failed, and the others are sampled as if they had been without them: the batch
is made anew, since an interrupted one may be half changed, and generators are set back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.sampling_params import SamplingType
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.structured_output.utils import apply_grammar_bitmask
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.vllm import bridge
from vllm_moe_compat.backend.vllm.checked_sampler import CheckedSampler, reason_without_token
from vllm_moe_compat.backend.vllm.failed_requests import NOT_FINITE, FailedRequests
from vllm_moe_compat.backend.vllm.foreign_processors import (
    OnePerRequest,
    is_foreign,
    one_per_request,
)
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput

HOST = torch.device("cpu")

# What vLLM reads of a scheduler's output where no request has drafts.
_NO_DRAFTS: Any = SimpleNamespace(scheduled_spec_decode_tokens={})


def as_wide_as(scores: torch.Tensor, columns: int) -> torch.Tensor:
    """Return ``scores [B, V]`` as ``[B, columns]``, padded with -inf.

    vLLM's masks are as wide as the config says, and the model's head may be narrower.
    """
    missing = columns - scores.shape[-1]
    return torch.nn.functional.pad(scores, (0, missing), value=-torch.inf) if missing else scores


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of one position.

    Attributes:
        tokens: by request id; some may have none.
        logprobs: log-probabilities, if a request wants them.
        rows: of the requests in ``logprobs``.
    """

    tokens: Mapping[str, int]
    logprobs: LogprobsTensors | None = None
    rows: Mapping[str, int] = field(default_factory=dict)


class HostSampler:
    """vLLM's sampler and its state."""

    def __init__(self, vllm_config: VllmConfig, failed: FailedRequests) -> None:
        self._config, self._failed = vllm_config, failed
        model = vllm_config.model_config
        self.max_model_len, self.vocab_size = model.max_model_len, model.get_vocab_size()
        bridge.sample_without_triton()
        self.sampler = CheckedSampler(logprobs_mode=model.logprobs_mode)
        self.states: dict[str, CachedRequestState] = {}
        self._requests: dict[str, Request] = {}
        self.batch = self._empty_batch()
        # A logits processor from outside vLLM may change the logits of any request.
        self.has_foreign_processors = any(map(is_foreign, self.batch.logitsprocs.all))

    def _empty_batch(self) -> InputBatch:
        model, scheduler = self._config.model_config, self._config.scheduler_config
        config = bridge.without_speculation(self._config)
        processors = build_logitsprocs(config, HOST, False, False, model.logits_processors or ())
        self._by_request: list[OnePerRequest] = []
        if self._config.speculative_config is not None:
            processors, self._by_request = one_per_request(
                processors, lambda kind: kind(config, HOST, False)
            )
        return InputBatch(
            max_num_reqs=scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            device=HOST,
            vocab_size=self.vocab_size,
            # The backend addresses blocks itself, but the batch requires a table.
            **bridge.input_batch_blocks([16]),
            logitsprocs=processors,
            logitsprocs_need_output_token_ids=bool(model.logits_processors),
            reasoning_config=bridge.reasoning_config(self._config),
        )

    @property
    def requests(self) -> list[Request]:
        """The requests of the batch's rows."""
        return [self._requests[req_id] for req_id in self.batch.req_ids]

    def forget(self, req_id: str) -> None:
        """Discard the state of a request."""
        self.states.pop(req_id, None)
        self._requests.pop(req_id, None)
        self.batch.remove_request(req_id)

    def select(self, requests: Sequence[Request]) -> None:
        """Make ``requests`` the batch, without those that fail."""
        self._requests = {request.req_id: request for request in requests}
        try:
            self._fill(requests)
        except Exception as error:  # noqa: BLE001 - whatever vLLM and logits processors raise
            logger.error("vLLM's sampler takes a batch of requests apart", exc_info=error)
            self._fill_with_sound(requests, lambda _: None)

    def _fill(self, requests: Iterable[Request]) -> None:
        wanted = {request.req_id: request for request in requests}
        for req_id in list(self.batch.req_id_to_index):
            if req_id not in wanted:
                self.batch.remove_request(req_id)
        for req_id, request in wanted.items():
            if req_id not in self.batch.req_id_to_index:
                self.batch.add_request(self._state(request))
        bridge.condense(self.batch)
        self.batch.refresh_metadata()

    def _fill_with_sound(
        self, requests: Sequence[Request], attempt: Callable[[Request], Any]
    ) -> None:
        """Make those requests the batch with which ``attempt`` succeeds alone; fail the others."""
        for request in requests:
            self.batch = self._empty_batch()
            try:
                self._fill([request])
                attempt(request)
            except Exception as error:  # noqa: BLE001 - as in ``select``
                self._fail(request, error)
        self.batch = self._empty_batch()
        together = [request for request in requests if request.req_id not in self._failed]
        try:
            self._fill(together)
        except Exception as error:  # noqa: BLE001 - only together: no one is to blame
            self.batch = self._empty_batch()
            for request in together:
                self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        reason = f"vLLM's sampler fails with its parameters ({type(error).__name__}: {error})"
        self._failed.fail(request, reason, taints_pages=False)

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
                sampling_params=bridge.without_unreachable_ids(params, self.vocab_size),
                generator=generator,
                block_ids=([],),
                num_computed_tokens=0,
                # The same list object, so that penalties see the tokens that we append.
                output_token_ids=request.output,
            )
            self.states[request.req_id] = state
        return state

    def draw(
        self,
        copy_scores: Callable[[Sequence[Request]], torch.Tensor],
        requests: Sequence[Request],
        grammar: GrammarOutput | None,
        *,
        again: bool = False,
    ) -> Drawn:
        """Draw a token for each of ``requests`` and append it to them.

        Args:
            copy_scores: returns a new copy of the scores ``[b, V]`` of these requests at each
                call: the sampler writes into it, also before it raises an error.
            requests: of the batch, in its order. Nothing changes for the others.
            grammar: masks of structured output, one row per request.
            again: a token of this step has been drawn for each before. Then a request for which
                no token can be drawn does not fail, since it has an answer: the next step draws
                from the same logits, and fails it.
        """
        generators = {
            request.req_id: self.states[request.req_id].generator.get_state()
            for request in requests
            if self.states[request.req_id].generator is not None
        }

        def set_back(req_ids: Iterable[str]) -> None:
            for req_id in req_ids:
                if req_id in generators:
                    self.states[req_id].generator.set_state(generators[req_id])

        def attempt(some: Sequence[Request]) -> tuple[Any, dict[str, tuple[str, bool]]]:
            scores = as_wide_as(copy_scores(some), self.vocab_size)
            return self._draw(scores, [request.req_id for request in some], grammar)

        sound: Sequence[Request] = requests
        try:
            if again:
                self._let_take_part(requests)
                self.batch.refresh_metadata()
            result, reasons = attempt(sound)
        except Exception as error:  # noqa: BLE001 - as in ``select``
            set_back(generators)
            if again:
                logger.error("vLLM's sampler leaves drafts unverified", exc_info=error)
                return Drawn({})
            logger.error("vLLM's sampler takes a batch of requests apart", exc_info=error)
            self._fill_with_sound(requests, lambda request: attempt([request]))
            set_back(generators)
            sound = self.requests
            for request in requests:
                if request.req_id not in self.batch.req_id_to_index:
                    request.output.append(0)  # nobody sees it
            if not sound:
                return Drawn({})
            result, reasons = attempt(sound)
        finally:
            self._let_take_part(None)
        if again:
            set_back(reasons)
            sound = [request for request in sound if request.req_id not in reasons]
        rows = {request.req_id: self.batch.req_id_to_index[request.req_id] for request in sound}
        drawn = result.sampled_token_ids.flatten().tolist()
        tokens = {}
        for request in sound:
            token = drawn[rows[request.req_id]]
            self._append(request.req_id, token)
            if request.req_id in reasons:
                reason, taints = reasons[request.req_id]
                self._failed.fail(request, reason, taints_pages=taints)
            else:
                tokens[request.req_id] = token
        return Drawn(tokens, result.logprobs_tensors, rows)

    def _let_take_part(self, requests: Sequence[Request] | None) -> None:
        """Call foreign logits processors for these requests only; None: for all."""
        of = self.batch.req_id_to_index
        rows = None if requests is None else {of[request.req_id] for request in requests}
        for one in self._by_request:
            one.rows = rows

    def _draw(
        self, scores: torch.Tensor, req_ids: Sequence[str], grammar: GrammarOutput | None
    ) -> tuple[Any, dict[str, tuple[str, bool]]]:
        """Draw from ``scores [b, V]`` of ``req_ids``, which is overwritten.

        Returns:
            The sampler's output, with a row for each row of the batch; of each of ``req_ids``
            without a token, the reason and whether it is the model's logits.
        """
        batch = self.batch
        sound = scores.max(dim=-1).values.isfinite()
        scores[~sound] = 0
        rows = [batch.req_id_to_index[req_id] for req_id in req_ids]
        if len(rows) < batch.num_reqs:
            # vLLM's parameters are those of the whole batch.
            part, scores = scores, scores.new_zeros(batch.num_reqs, self.vocab_size)
            scores[rows] = part
        if grammar is not None:
            apply_grammar_bitmask(_NO_DRAFTS, grammar, batch, scores)
        with torch.no_grad():
            result = self.sampler.sample_rows(rows, scores, batch.sampling_metadata)
        reasons: dict[str, tuple[str, bool]] = {}
        tops = self.sampler.tops.tolist()
        for req_id, row, is_sound in zip(req_ids, rows, sound.tolist(), strict=True):
            if not is_sound:
                reasons[req_id] = NOT_FINITE, True
            elif not np.isfinite(tops[row]):
                reasons[req_id] = reason_without_token(tops[row]), False
        return result, reasons

    def _append(self, req_id: str, token: int) -> None:
        row = self.batch.req_id_to_index[req_id]
        self._write(row, int(self.batch.num_tokens_no_spec[row]), [token])
        self.states[req_id].output_token_ids.append(token)

    def replace(self, req_id: str, count: int, tokens: Sequence[int]) -> None:
        """Replace the last ``count`` tokens of a request in the batch.

        Its list of tokens has the new ones already.
        """
        row = self.batch.req_id_to_index.get(req_id)
        if row is not None:
            self._write(row, int(self.batch.num_tokens_no_spec[row]) - count, tokens)

    def _write(self, row: int, start: int, tokens: Sequence[int]) -> None:
        """Make ``tokens`` the last ones of a row of the batch, from ``start`` on."""
        end = start + len(tokens)
        room = max(min(end, self.max_model_len) - start, 0)
        self.batch.token_ids_cpu[row, start : start + room] = tokens[:room]
        self.batch.is_token_ids[row, start : start + room] = True
        self.batch.num_tokens_no_spec[row] = end
