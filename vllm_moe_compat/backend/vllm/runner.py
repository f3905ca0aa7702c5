"""The model runner: from vLLM's schedule to logits, and from logits to tokens.

A step runs its prefill passes first, then one pass with one token for every request that samples.
``step.forward`` runs a pass, ``sampling`` draws the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Batch, Pass, Request
from vllm_moe_compat.backend.step.forward import Forward
from vllm_moe_compat.backend.step.schedule import Schedule
from vllm_moe_compat.backend.vllm.sampling import TokenSampler
from vllm_moe_compat.backend.vllm.scheduler_output import read_schedule

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


class PendingOutput(AsyncModelRunnerOutput):
    """The output of a step whose pass may still run.

    With async scheduling vLLM asks for the output after it has scheduled the next step, so the
    engine works while MLX computes.
    """

    def __init__(self, complete: Callable[[], ModelRunnerOutput]) -> None:
        """``complete`` waits for the pass and makes the output; it is called once."""
        self._complete = complete
        self._output: ModelRunnerOutput | None = None

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the output.

        Must be called on the thread that runs the steps, since MLX does not evaluate their graphs
        on another one. The only executor that the platform allows does so.
        """
        if self._output is None:
            self._output = self._complete()
        return self._output


class ModelRunner:
    """Runs the steps of one model."""

    def __init__(self, model: nn.Module, storage: LayerStorage, sampler: TokenSampler) -> None:
        self.model, self.storage, self.sampler = model, storage, sampler
        self.batch = Batch()
        self.forward = Forward(model, storage)
        self._scheduler_output: SchedulerOutput | None = None
        self._order: list[str] = []
        self._logits: mx.array | None = None
        self._drawn: mx.array | None = None
        self._unsampled: list[str] = []
        self._pending: PendingOutput | None = None

    def close(self) -> None:
        """Wait for the running pass and remove the attention hook."""
        if not self.is_suspended:
            self.forward.close()

    @property
    def is_suspended(self) -> bool:
        """Whether no pass can run."""
        return "forward" not in vars(self)

    def suspend(self) -> None:
        """End the running pass and let go of the model; requests stay known."""
        if self._pending is not None:
            self._pending.get_output()
            self._pending = None
        self.forward.close()
        self._logits = self._drawn = None
        self.model = nn.Module()
        del self.forward

    def resume(self, model: nn.Module) -> None:
        """Go on after ``suspend``."""
        self.model = model
        self.forward = Forward(model, self.storage)

    def take_note(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Take note of finished requests while suspended, in place of ``execute_model``."""
        schedule = read_schedule(scheduler_output)
        self.batch.update(schedule)
        self.sampler.forget(set(schedule.finished))
        return EMPTY_MODEL_RUNNER_OUTPUT

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run the forward passes of a step; ``sample_tokens`` completes it.

        Returns the empty output if nothing was scheduled, else None.
        """
        if self._pending is not None:
            self._pending.get_output()
            self._pending = None
        schedule = read_schedule(scheduler_output)
        lost = self.batch.update(schedule)
        self.sampler.forget(set(schedule.finished))
        self.storage.states.drop(lost)
        self._drop_preempted(schedule)
        if schedule.page_copies:
            self.forward.discard_next()
        for pool in self.storage.distinct_pools:
            pool.copy(schedule.page_copies)
        scheduled = schedule.scheduled
        if not scheduled:
            self.forward.discard_next()
            return EMPTY_MODEL_RUNNER_OUTPUT
        requests = [self.batch.requests[req_id] for req_id in scheduled]
        sizes = self.storage.attention_block_sizes
        self.storage.zero_blocks(self.batch.partial_blocks(scheduled, sizes))
        for work in self.batch.prefills(scheduled, self.storage.block_sizes):
            self._prefill(work)
        sampling: list[Request] = []
        unsampled: list[Request] = []
        for request in requests:
            samples = self.batch.samples(request.req_id, scheduled[request.req_id])
            (sampling if samples else unsampled).append(request)
        self._order = self.sampler.select(sampling)
        self._unsampled = [request.req_id for request in unsampled]
        self._logits = self._drawn = None
        if self._order:
            work = self.batch.decodes(self._order, scheduled)
            build_next = not self._unsampled and self.sampler.draws_all
            self._logits, self._drawn = self.forward.decode(
                work, self.sampler.draw, build_next=build_next
            )
        self._save_states(requests, scheduled)
        self._scheduler_output = scheduler_output
        return None

    def _drop_preempted(self, schedule: Schedule) -> None:
        """Discard the states of preempted requests.

        vLLM does not name them, and a request that is merely not scheduled in this step must
        keep its state. But vLLM never assigns the block of a state in use to another request. At
        a block boundary the block may be shared, and then its page holds the state too.
        """
        states = self.storage.states
        paused = states.resident - schedule.scheduled.keys()
        if not paused:
            return
        assigned = schedule.assigned_blocks()
        requests = [self.batch.requests[req_id] for req_id in paused]
        blocks = self.storage.state_blocks(
            [request.blocks for request in requests], [request.done for request in requests]
        )
        states.drop(
            {
                request.req_id
                for i, request in enumerate(requests)
                if any(held[i] in assigned for held in blocks.values())
            }
        )

    def _prefill(self, work: Pass) -> None:
        scored = [
            row
            for row, request in enumerate(work.requests)
            if request.params.prompt_logprobs is not None and not request.output
        ]
        logits = self.forward(work, scored)
        for i, row in enumerate(scored):
            start, count = int(work.offsets[row]), int(work.lengths[row])
            self.sampler.score_prompt(work.requests[row], start, logits[i, :count])

    def _save_states(self, requests: Sequence[Request], scheduled: dict[str, int]) -> None:
        """Write to pages the states that a later step may have to read from there."""
        storage = self.storage
        if not storage.states.layers:
            return
        block = storage.block_sizes[storage.states.groups[0]]
        keep, counts, unfinished = [], [], set()
        for request in requests:
            end = request.done = request.computed + scheduled[request.req_id]
            is_partial = end < request.num_tokens
            if is_partial:
                unfinished.add(request.req_id)
            if is_partial or (storage.keep_boundaries and end % block == 0):
                keep.append(request)
                counts.append(end)
        if keep:
            self.forward.discard_next()
            blocks = storage.state_blocks([r.blocks for r in keep], counts)
            storage.states.save([r.req_id for r in keep], blocks)
        if unfinished:
            storage.states.drop(unfinished)

    def sample_tokens(self, grammar: GrammarOutput | None) -> ModelRunnerOutput | PendingOutput:
        """Sample from the logits of ``execute_model``; unfinished prompts get no token.

        A running pass is not waited for. Its tokens are there when ``get_output`` is called, and
        at the latest when the next step begins.
        """
        assert self._scheduler_output is not None, "sample_tokens before execute_model"
        scheduler_output, self._scheduler_output = self._scheduler_output, None
        complete = partial(self._complete, scheduler_output, grammar)
        if not self.forward.running:
            return complete()
        self._pending = PendingOutput(complete)
        return self._pending

    def _complete(
        self, scheduler_output: SchedulerOutput, grammar: GrammarOutput | None
    ) -> ModelRunnerOutput:
        self.forward.wait()
        tokens: list[list[int]] = []
        logprobs = None
        if self._logits is not None:
            logits, self._logits = self._logits, None
            drawn, self._drawn = self._drawn, None
            sampled, logprobs = self.sampler.sample(logits, drawn, scheduler_output, grammar)
            tokens = [[token] for token in sampled]
        req_ids = self._order + self._unsampled
        prompts = {}
        for req_id in self._order:
            finished = self.sampler.finished_prompt(req_id)
            if finished is not None:
                prompts[req_id] = finished
        return ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=tokens + [[] for _ in self._unsampled],
            logprobs=logprobs,
            prompt_logprobs_dict=prompts,
        )
