"""One step: from vLLM's schedule to logits, and from logits to tokens.

In: a scheduler output and a loaded model. Out: vLLM's ``ModelRunnerOutput``.
Prefill passes run first, then one pass of one token for every request that
samples. ``forward`` runs a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_moe_compat.backend.model.layers import AttentionLayer, Layer, StateLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.state_pool import StatePool
from vllm_moe_compat.backend.step.batch import Batch, Pass, Request
from vllm_moe_compat.backend.step.forward import Forward
from vllm_moe_compat.backend.vllm.sampling import TokenSampler
from vllm_moe_compat.backend.vllm.scheduler_output import Step, decode

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


class Memory:
    """Where every layer keeps what it keeps: its page pool, KV group and block size."""

    def __init__(
        self,
        layers: Sequence[Layer],
        pools: dict[int, PagePool],
        groups: dict[int, int],
        block_sizes: Sequence[int],
        *,
        keep_boundaries: bool,
    ) -> None:
        """``pools`` and ``groups`` by layer index, ``block_sizes`` by KV group.

        ``keep_boundaries``: prefix caching is on, so states at block
        boundaries may be asked for again.
        """
        self.layers, self.pools, self.groups = list(layers), pools, groups
        self.block_sizes = list(block_sizes)
        self.keep_boundaries = keep_boundaries
        stateful = [layer for layer in layers if isinstance(layer, StateLayer)]
        self.states = StatePool(
            stateful,
            [pools[layer.index] for layer in stateful],
            [groups[layer.index] for layer in stateful],
        )
        self.attention_groups = {
            groups[layer.index]: pools[layer.index]
            for layer in layers
            if isinstance(layer, AttentionLayer)
        }

    @property
    def distinct_pools(self) -> list[PagePool]:
        """Every pool once."""
        return list({id(pool): pool for pool in self.pools.values()}.values())

    def state_blocks(
        self, requests: Sequence[Request], tokens: Sequence[int]
    ) -> dict[int, list[int]]:
        """By group of states, the block of each request's state after ``tokens``."""
        return {
            group: [
                request.blocks[group][max(count - 1, 0) // self.block_sizes[group]]
                for request, count in zip(requests, tokens, strict=True)
            ]
            for group in set(self.states.groups)
        }

    def clear_partial_blocks(self, requests: Sequence[Request], scheduled: dict[str, int]) -> None:
        """Zero the KV blocks that this step begins and does not fill in one pass.

        What is left in them from an earlier owner may be a state's bits, NaN as
        keys; masking alone would let it through. A prompt's last token comes in a
        pass of its own, after others have read its block.
        """
        for group, size in enumerate(self.block_sizes):
            if group not in self.attention_groups:
                continue
            blocks = []
            for request in requests:
                end = request.computed + scheduled[request.req_id]
                last = (end - 1) // size
                later = end >= request.num_tokens
                if last * size >= request.computed and (end % size or later):
                    blocks.append(request.blocks[group][last])
            if blocks:
                for layer in self.layers:
                    if self.groups[layer.index] == group:
                        self.pools[layer.index].zero(blocks)


class StepOutput(AsyncModelRunnerOutput):
    """What a step gives, when its pass has ended.

    vLLM's async scheduling asks for it after it has scheduled the next step, so
    that the engine's own work is done while MLX computes.
    """

    def __init__(self, complete: Callable[[], ModelRunnerOutput]) -> None:
        """``complete`` waits for the pass and makes the output; it is called once."""
        self._complete = complete
        self._output: ModelRunnerOutput | None = None

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the output.

        On the thread that runs steps, as the one executor that the platform allows
        does: MLX evaluates nothing on another one.
        """
        if self._output is None:
            self._output = self._complete()
        return self._output


class ModelRunner:
    """Executes steps for one model."""

    def __init__(self, model: nn.Module, memory: Memory, sampler: TokenSampler) -> None:
        self.model, self.memory, self.sampler = model, memory, sampler
        self.batch = Batch()
        self.forward = Forward(model, memory)
        self._scheduler_output: SchedulerOutput | None = None
        self._order: list[str] = []
        self._logits: mx.array | None = None
        self._drawn: mx.array | None = None
        self._unsampled: list[str] = []
        self._last: StepOutput | None = None

    def execute(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run the forward passes of a step; ``sample`` completes it.

        Returns the empty output when nothing was scheduled, else None.
        """
        if self._last is not None:
            self._last.get_output()
            self._last = None
        step = decode(scheduler_output)
        lost = self.batch.update(step)
        self.sampler.forget(set(step.finished))
        self.memory.states.drop(lost)
        self._drop_preempted(step)
        if step.page_copies:
            self.forward.forget()
        for pool in self.memory.distinct_pools:
            pool.copy(step.page_copies)
        scheduled = step.scheduled
        if not scheduled:
            self.forward.forget()
            return EMPTY_MODEL_RUNNER_OUTPUT
        requests = [self.batch.requests[req_id] for req_id in scheduled]
        self.memory.clear_partial_blocks(requests, scheduled)
        for work in self.batch.prefills(scheduled, self.memory.block_sizes):
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
            ahead = not self._unsampled and self.sampler.draws_all
            self._logits, self._drawn = self.forward.decode(work, self.sampler.draw, ahead=ahead)
        self._save_states(requests, scheduled)
        self._scheduler_output = scheduler_output
        return None

    def _drop_preempted(self, step: Step) -> None:
        """Let go of states whose requests lost their pages without a word.

        vLLM does not name preempted requests, and one that is merely not
        scheduled must keep its state. But the block of a state that is still in
        use is never given away; at a block boundary it may be shared, and then
        the page holds the state too.
        """
        states = self.memory.states
        paused = states.resident - step.scheduled.keys()
        if not paused:
            return
        given = step.given_blocks()
        requests = [self.batch.requests[req_id] for req_id in paused]
        blocks = self.memory.state_blocks(requests, [request.done for request in requests])
        states.drop(
            {
                request.req_id
                for i, request in enumerate(requests)
                if any(held[i] in given for held in blocks.values())
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
        memory = self.memory
        if not memory.states.layers:
            return
        block = memory.block_sizes[memory.states.groups[0]]
        keep, counts, unfinished = [], [], set()
        for request in requests:
            end = request.done = request.computed + scheduled[request.req_id]
            partial = end < request.num_tokens
            if partial:
                unfinished.add(request.req_id)
            if partial or (memory.keep_boundaries and end % block == 0):
                keep.append(request)
                counts.append(end)
        if keep:
            self.forward.forget()
            memory.states.save([r.req_id for r in keep], memory.state_blocks(keep, counts))
        if unfinished:
            memory.states.drop(unfinished)

    def sample(self, grammar: GrammarOutput | None) -> ModelRunnerOutput | StepOutput:
        """Sample what ``execute`` computed; chunks of unfinished prompts get no token.

        A pass that still runs is not waited for: its tokens are there when
        ``get_output`` is called, and at the latest when the next step begins.
        """
        assert self._scheduler_output is not None, "sample_tokens before execute_model"
        scheduler_output, self._scheduler_output = self._scheduler_output, None
        complete = partial(self._complete, scheduler_output, grammar)
        if not self.forward.running:
            return complete()
        self._last = StepOutput(complete)
        return self._last

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
