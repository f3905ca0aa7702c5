"""Sampling by vLLM's own sampler, on the host.

vLLM's ``InputBatch`` keeps the state that parameters need (penalties, generators, logits
processors) and its ``Sampler`` draws, so every parameter has vLLM's meaning. A request joins the
batch when it first samples: a prompt computed in chunks draws nothing from a seeded generator
before its end.

vLLM's code works on the whole batch. If it raises an error, each request is tried alone, those
that fail alone are failed, and the others are sampled as if they had been without them: the batch
is made anew, since an interrupted one may be half changed, and generators are set back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.sampling_params import SamplingType
from vllm.v1.outputs import LogprobsLists
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.structured_output.utils import apply_grammar_bitmask
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.vllm import bridge
from vllm_moe_compat.backend.vllm.checked_sampler import CheckedSampler, reason_without_token
from vllm_moe_compat.backend.vllm.failed_requests import NOT_FINITE, FailedRequests
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

HOST = torch.device("cpu")


def as_wide_as(scores: torch.Tensor, columns: int) -> torch.Tensor:
    """Return ``scores [B, V]`` as ``[B, columns]``, padded with -inf.

    vLLM's masks are as wide as the config says, and the model's head may be narrower.
    """
    missing = columns - scores.shape[-1]
    return torch.nn.functional.pad(scores, (0, missing), value=-torch.inf) if missing else scores


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
        self.has_foreign_processors = any(
            not type(one).__module__.startswith("vllm.v1.sample.")
            for one in self.batch.logitsprocs.all
        )

    def _empty_batch(self) -> InputBatch:
        model, scheduler = self._config.model_config, self._config.scheduler_config
        return InputBatch(
            max_num_reqs=scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            device=HOST,
            vocab_size=self.vocab_size,
            # The backend addresses blocks itself, but the batch requires a table.
            **bridge.input_batch_blocks([16]),
            logitsprocs=build_logitsprocs(
                self._config, HOST, False, False, model.logits_processors or ()
            ),
            logitsprocs_need_output_token_ids=bool(model.logits_processors),
            reasoning_config=bridge.reasoning_config(self._config),
        )

    @property
    def order(self) -> list[str]:
        """Ids of the batch's rows."""
        return list(self.batch.req_ids)

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
        self.batch.condense()
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

    def sample(
        self,
        copy_scores: Callable[[], torch.Tensor],
        scheduler_output: SchedulerOutput,
        grammar: GrammarOutput | None,
    ) -> tuple[list[str], list[list[int]], LogprobsLists | None]:
        """Sample a token for each row of scores ``[B, V]`` and append it to its request.

        ``copy_scores`` returns a new copy of them at each call: the sampler writes into it, also
        before it raises an error.

        Returns:
            Ids of the requests, in the order of the rows of the log-probabilities; the token of
            each, none for a request that failed; log-probabilities.
        """
        rows = {req_id: row for row, req_id in enumerate(self.order)}

        def draw(scores: torch.Tensor) -> Any:
            return self._draw(as_wide_as(scores, self.vocab_size), scheduler_output, grammar)

        def draw_again() -> Any:
            return draw(copy_scores()[[rows[req_id] for req_id in self.order]])

        generators = {
            req_id: self.states[req_id].generator.get_state()
            for req_id in rows
            if self.states[req_id].generator is not None
        }

        def set_back() -> None:
            for req_id, state in generators.items():
                self.states[req_id].generator.set_state(state)

        try:
            result, reasons = draw(copy_scores())
        except Exception as error:  # noqa: BLE001 - as in ``select``
            logger.error("vLLM's sampler takes a batch of requests apart", exc_info=error)
            set_back()
            requests = [self._requests[req_id] for req_id in rows]
            self._fill_with_sound(requests, lambda _: draw_again())
            set_back()
            if not self.order:
                return self._without_tokens(rows), [[] for _ in rows], None
            result, reasons = draw_again()
        tokens = self._append(result.sampled_token_ids.flatten().tolist(), reasons)
        order = self.order
        apart = self._without_tokens([req_id for req_id in rows if req_id not in order])
        logprobs = result.logprobs_tensors
        return (
            order + apart,
            tokens + [[] for _ in apart],
            None if logprobs is None else logprobs.tolists(),
        )

    def _draw(
        self, scores: torch.Tensor, scheduler_output: SchedulerOutput, grammar: GrammarOutput | None
    ) -> tuple[Any, dict[int, tuple[str, bool]]]:
        """Draw from ``scores [B, V]``, which is overwritten.

        Returns:
            The sampler's output; of each row without a token, the reason and whether it is the
            model's logits.
        """
        sound = scores.max(dim=-1).values.isfinite()
        scores[~sound] = 0
        if grammar is not None:
            apply_grammar_bitmask(scheduler_output, grammar, self.batch, scores)
        with torch.no_grad():
            result = self.sampler(logits=scores, sampling_metadata=self.batch.sampling_metadata)
        reasons: dict[int, tuple[str, bool]] = {}
        for row, (is_sound, top) in enumerate(
            zip(sound.tolist(), self.sampler.tops.tolist(), strict=True)
        ):
            if not is_sound:
                reasons[row] = NOT_FINITE, True
            elif not np.isfinite(top):
                reasons[row] = reason_without_token(top), False
        return result, reasons

    def _append(
        self, drawn: Sequence[int], reasons: dict[int, tuple[str, bool]]
    ) -> list[list[int]]:
        """Append the tokens to their requests; fail the rows that have a reason."""
        tokens: list[list[int]] = []
        for row, token in enumerate(drawn):
            req_id = self.batch.req_ids[row]
            end = int(self.batch.num_tokens_no_spec[row])
            if end < self.max_model_len:
                self.batch.token_ids_cpu[row, end] = token
                self.batch.is_token_ids[row, end] = True
            self.batch.num_tokens_no_spec[row] = end + 1
            self.states[req_id].output_token_ids.append(token)
            tokens.append([] if row in reasons else [token])
            if row in reasons:
                reason, taints = reasons[row]
                self._failed.fail(self._requests[req_id], reason, taints_pages=taints)
        return tokens

    def replace_last(self, req_id: str, token: int) -> None:
        """Replace the last token of a request in the batch; its list has the new one already."""
        row = self.batch.req_id_to_index.get(req_id)
        if row is not None:
            last = int(self.batch.num_tokens_no_spec[row]) - 1
            if last < self.max_model_len:
                self.batch.token_ids_cpu[row, last] = token

    def _without_tokens(self, req_ids: Iterable[str]) -> list[str]:
        """Append a token that nobody sees to requests that failed; return their ids."""
        for req_id in req_ids:
            self._requests[req_id].output.append(0)
        return list(req_ids)
