"""From logits to tokens, by vLLM's own sampler.

In: logits ``[B, V]`` of the requests that sample in this step. Out: one token
each, and log-probabilities where asked for. vLLM's ``InputBatch`` keeps what
the parameters need (temperatures, penalties, generators, logits processors),
its ``Sampler`` does the rest on the host, so that every parameter means what it
means elsewhere. A request joins the batch when it first samples: a prompt that
is computed in chunks draws nothing from a seeded generator before its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import torch
from vllm.sampling_params import SamplingType
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.sample.sampler import Sampler
from vllm.v1.structured_output.utils import apply_grammar_bitmask
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_moe_compat.backend.batch import Request

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

HOST = torch.device("cpu")


def to_torch(logits: mx.array) -> torch.Tensor:
    """Evaluated logits as a float32 tensor that the sampler may write into."""
    return torch.from_numpy(np.array(logits.astype(mx.float32)))


class TokenSampler:
    """vLLM's sampler and the state that it needs of each request."""

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
            block_sizes=[16],
            max_num_blocks_per_req=[1],
            logitsprocs=build_logitsprocs(
                vllm_config, HOST, False, False, model.logits_processors or ()
            ),
            logitsprocs_need_output_token_ids=bool(model.logits_processors),
            reasoning_config=getattr(vllm_config, "reasoning_config", None),
        )
        self.states: dict[str, CachedRequestState] = {}
        self._prompt_logprobs: dict[str, LogprobsTensors] = {}

    def forget(self, req_ids: set[str]) -> None:
        """Forget requests that ended."""
        for req_id in req_ids:
            self.states.pop(req_id, None)
            self._prompt_logprobs.pop(req_id, None)
            self.batch.remove_request(req_id)

    def select(self, requests: Sequence[Request]) -> list[str]:
        """Make ``requests`` the batch that samples; return their ids in its order."""
        wanted = {request.req_id: request for request in requests}
        for req_id in list(self.batch.req_id_to_index):
            if req_id not in wanted:
                self.batch.remove_request(req_id)
        for req_id, request in wanted.items():
            if req_id not in self.batch.req_id_to_index:
                self.batch.add_request(self._state(request))
        self.batch.condense()
        self.batch.refresh_metadata()
        return list(self.batch.req_ids)

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
        scheduler_output: SchedulerOutput,
        grammar: GrammarOutput | None,
    ) -> tuple[list[int], LogprobsLists | None]:
        """Sample one token for each row of ``logits [B, V]`` and append it."""
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
