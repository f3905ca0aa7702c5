"""The model runner: from vLLM's schedule to logits, and from logits to tokens.

A step runs its prefill passes first, then one pass with the last token of every request that
samples, and its drafts. ``step.forward`` runs a pass, ``sampling`` draws the tokens, and
``step.drafting`` proposes the drafts of the next step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    DraftTokenIds,
    ModelRunnerOutput,
)

from vllm_moe_compat.backend.model.hidden_states import HiddenStates
from vllm_moe_compat.backend.model.prediction_heads import PredictionHeads
from vllm_moe_compat.backend.model.state_recording import StateRecording
from vllm_moe_compat.backend.pages.layers import has_states
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step import kept_states
from vllm_moe_compat.backend.step.batch import Batch, Pass, Request
from vllm_moe_compat.backend.step.drafting import Drafting
from vllm_moe_compat.backend.step.forward import Forward
from vllm_moe_compat.backend.step.mtp import MtpDrafter
from vllm_moe_compat.backend.step.schedule import Schedule
from vllm_moe_compat.backend.vllm import request_checks
from vllm_moe_compat.backend.vllm.expert_cache_stats import ExpertCounts
from vllm_moe_compat.backend.vllm.pending_output import PendingOutput
from vllm_moe_compat.backend.vllm.rank_agreement import RankAgreement
from vllm_moe_compat.backend.vllm.sampling import TokenSampler
from vllm_moe_compat.backend.vllm.scheduler_output import read_schedule
from vllm_moe_compat.backend.vllm.step_output import StepOutput
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

    from vllm_moe_compat.backend.vllm.rank_group import RankGroup


class ModelRunner:
    """Runs the steps of one model."""

    def __init__(
        self,
        model: nn.Module,
        storage: LayerStorage,
        sampler: TokenSampler,
        *,
        compiles: bool = False,
        ranks: RankGroup | None = None,
        expert_counts: ExpertCounts | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        """Make the runner of one model.

        Args:
            model: loaded.
            storage: of its layers.
            sampler: draws the tokens.
            compiles: whether decode passes may be compiled.
            ranks: compute the model together.
            expert_counts: of the engine.
            drafting: proposes drafts; None for no speculation.
        """
        self.drafting = drafting
        self.model, self.storage, self.sampler = model, storage, sampler
        self._expert_counts = expert_counts or ExpertCounts()
        # Whether passes are compiled, or built ahead, is decided on each rank: by what its
        # compiler and its disk do, and by its draws. All have to evaluate the same.
        compiles = compiles and ranks is None
        # Request id → its last token, drawn by a head with more columns than embeddings.
        self._drawn_without_row: dict[str, int] = {}
        self.batch = Batch(sampler.rows.embedding)
        self._compiles = compiles
        self._agreement = None if ranks is None else RankAgreement(ranks, storage, sampler)
        self.forward = self._make_forward()
        self._scheduler_output: SchedulerOutput | None = None
        self._order: list[str] = []
        self._logits: mx.array | None = None
        self._drawn: mx.array | None = None
        self._unsampled: list[str] = []
        # The pass whose drafts the step verifies, and when its pass began.
        self._verified: Pass | None = None
        self._pass_began = 0.0
        self._pending: PendingOutput | None = None

    def _make_forward(self) -> Forward:
        recording = None
        # The ranks of a pipeline try it together, and each has other layers.
        if self.drafting is not None and has_states(self.storage.of_all_ranks):
            recording = StateRecording(self.model)
            reason = recording.unsupported
            if self._agreement is not None:
                reason = self._agreement.first(reason)
            if reason:
                logger.warning("No drafts are made, since states cannot be kept: %s.", reason)
                self.drafting = None
        forward = Forward(self.model, self.storage, compiles=self._compiles, recording=recording)
        if self._follower is not None:
            forward.keep_hidden(HiddenStates(self.model))
            self._follower.passes.before_write = forward.discard_next
        if self._agreement is not None:
            forward.before_pass = self._agreement.before_pass
        return forward

    @property
    def _follower(self) -> MtpDrafter | None:
        """The drafter that needs the hidden states of all passes."""
        return None if self.drafting is None else self.drafting.follower

    def _follow(self) -> None:
        """Hand over the hidden states of the passes since the last call."""
        if self._follower is not None:
            for work, hidden in self.forward.take_hidden():
                self._follower.follow(work, hidden)

    def close(self) -> None:
        """Wait for the running pass and remove the attention hook."""
        if not self.is_suspended:
            self.forward.close()
            if self._follower is not None:
                self._follower.suspend()
        self._pending = None  # It refers to this object, which holds the pools.

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
        if self._follower is not None:
            self._follower.suspend()
        del self.forward

    def resume(self, model: nn.Module, heads: PredictionHeads | None = None) -> None:
        """Go on after ``suspend``."""
        self.model = model
        if self._follower is not None:
            assert heads is not None, "the model is loaded with them"
            self._follower.resume(heads)
        self.forward = self._make_forward()

    def take_note(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Take note of finished requests while suspended, in place of ``execute_model``."""
        self._update(read_schedule(scheduler_output))
        return EMPTY_MODEL_RUNNER_OUTPUT

    def _update(self, schedule: Schedule) -> set[str]:
        """Begin, go on with and end requests; return those that no longer own their pages."""
        lost = self.batch.update(schedule)
        self.sampler.forget(set(schedule.finished))
        self.sampler.failed.forget(schedule.finished)
        if self.drafting is not None:
            for req_id in schedule.finished:
                self.drafting.forget(req_id)
        if self._follower is not None:
            for req_id in lost:
                self._follower.forget(req_id)
        self._refuse(schedule)
        self._spread_failures(schedule.page_copies)
        return lost

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run the forward passes of a step; ``sample_tokens`` completes it.

        Returns the empty output if nothing was scheduled, else None.
        """
        if self._pending is not None:
            self._pending.get_output()
            self._pending = None
        if self._agreement is not None:
            self._agreement.begin_step()
        schedule = read_schedule(scheduler_output)
        self.storage.states.drop(self._update(schedule))
        kept_states.drop_preempted(self.storage, self.batch, schedule)
        if schedule.page_copies:
            self.forward.discard_next()
        for pool in self.storage.all_pools:
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
        self._logits = self._drawn = self._verified = None
        self._pass_began = time.perf_counter()
        if self._order:
            work = self.batch.decodes(self._order, scheduled)
            build_next = (
                self._agreement is None
                and not self._unsampled
                and self.sampler.draws_all
                and not self._draws_without_row
                and (self.drafting is None or self.drafting.idle)
            )
            if work.verifies:
                self._verified = work
                self._logits = self.forward.verify(work)
            else:
                self._logits, self._drawn = self.forward.decode(
                    work, self.sampler.draw, build_next=build_next
                )
            self._fail_rows(work)
        if self.storage.states.layers:
            # Those of verified rows are kept when their tokens are known.
            done = unsampled if self._verified else requests
            kept_states.save(self.storage, done, scheduled, self.forward.discard_next)
        self._scheduler_output = scheduler_output
        return None

    def _refuse(self, schedule: Schedule) -> None:
        """Fail requests that the model cannot compute, and make their tokens harmless.

        The front end refuses such prompts, but requests may come without one.
        """
        for new in schedule.new:
            request = self.batch.requests[new.req_id]
            fault = request_checks.first_fault(request.prompt, request.params, self.sampler.rows)
            if fault:
                self.sampler.failed.fail(request, fault, taints_pages=True)
                request.prompt = [0] * len(request.prompt)
        for req_id in schedule.finished:
            self._drawn_without_row.pop(req_id, None)
        for req_id in schedule.scheduled.keys() & self._drawn_without_row.keys():
            token, count = self._drawn_without_row.pop(req_id), self.sampler.rows.embedding
            reason = f"it drew token {token}, and the model's embeddings have {count} rows"
            self.sampler.failed.fail(self.batch.requests[req_id], reason, taints_pages=True)

    def _fail_rows(self, work: Pass) -> None:
        """Fail the requests for which the pass ``work`` could not read an expert."""
        for row, error in self.forward.failed_rows.items():
            request, since = work.requests[row], int(work.offsets[row])
            self.sampler.failed.fail(request, str(error), taints_pages=True, since=since)
        self._spread_failures()

    def _spread_failures(self, copies: Sequence[tuple[int, int]] = ()) -> None:
        """Fail the requests that start behind pages of failed ones."""
        sizes = self.storage.block_sizes
        self.sampler.failed.spread(self.batch.behind_prefix, sizes, copies)

    @property
    def _draws_without_row(self) -> bool:
        """Whether the head has columns for which the embeddings have no row."""
        return self.sampler.rows.head > self.sampler.rows.embedding

    def _prefill(self, work: Pass) -> None:
        scored = [
            row
            for row, request in enumerate(work.requests)
            if request.params.prompt_logprobs is not None and not request.output
        ]
        logits = self.forward(work, scored)
        self._follow()
        self._fail_rows(work)
        for i, row in enumerate(scored):
            start, count = int(work.offsets[row]), int(work.lengths[row])
            request = work.requests[row]
            if request.failed:
                continue
            try:
                self.sampler.score_prompt(request, start, logits[i, :count])
            except Exception as error:  # noqa: BLE001 - whatever vLLM raises
                logger.error("log-probabilities of a prompt cannot be computed", exc_info=error)
                reason = f"its prompt_logprobs fail ({type(error).__name__}: {error})"
                self.sampler.failed.fail(request, reason, taints_pages=False)
        self._spread_failures()

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
        self._follow()
        order: list[str] = []
        tokens: list[list[int]] = []
        logprobs = None
        if self._logits is not None:
            logits, self._logits = self._logits, None
            drawn, self._drawn = self._drawn, None
            sampler = self.sampler
            if self._verified is not None:
                order, tokens, logprobs = sampler.verify(logits, scheduler_output, grammar)
            else:
                order, tokens, logprobs = sampler.sample(logits, drawn, scheduler_output, grammar)
            if self._agreement is not None:
                tokens = self._agreement.on_tokens(self.batch.requests, order, tokens)
            if self._verified is not None:
                self._accept(self._verified, dict(zip(order, tokens, strict=True)))
        req_ids = order + self._unsampled
        failures = self.sampler.failed.among(req_ids)
        if self.drafting is not None:
            # Fewer than configured if vLLM chooses the number by the size of the batch.
            most = scheduler_output.num_spec_tokens_to_schedule
            self._draft(self.drafting, order, tokens, most)
        prompts = {}
        for req_id in order:
            finished = self.sampler.finished_prompt(req_id)
            if finished is not None and req_id not in failures:
                prompts[req_id] = finished
        if self._draws_without_row:
            self._note_tokens_without_row(order)
        return StepOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=tokens + [[] for _ in self._unsampled],
            logprobs=logprobs,
            prompt_logprobs_dict=prompts,
            failures=failures,
            expert_counts=self._expert_counts(),
        )

    def _accept(self, work: Pass, tokens: Mapping[str, list[int]]) -> None:
        """Keep what the drafts computed as far as they were right."""
        # A failed request has no tokens.
        counts = {req_id: max(len(drawn), 1) for req_id, drawn in tokens.items()}
        self.forward.accept(counts)
        for request, offset in zip(work.requests, work.offsets.tolist(), strict=True):
            request.done = offset + counts[request.req_id]

    def _draft(
        self, drafting: Drafting, order: Sequence[str], tokens: Sequence[list[int]], most: int
    ) -> None:
        """Propose drafts for the next step, and take note of those of this one."""
        drawn = [(self.batch.requests[r], got) for r, got in zip(order, tokens, strict=True) if got]
        requests = [request for request, _ in drawn]
        accepted = [len(got) - 1 for _, got in drawn]
        drafting.observe(requests, accepted, time.perf_counter() - self._pass_began)
        drafting.propose(requests, most)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Return the drafts for the next step; None without speculation."""
        if self.drafting is None:
            return None
        proposed = self.drafting.take()
        return DraftTokenIds(list(proposed), list(proposed.values()))

    def _note_tokens_without_row(self, req_ids: Sequence[str]) -> None:
        """Note requests whose last token has no row: they fail if they go on."""
        for req_id in req_ids:
            request = self.batch.requests[req_id]
            token = request.output[-1]
            if token >= self.sampler.rows.embedding:
                request.output[-1] = 0
                self._drawn_without_row[req_id] = token
