"""vLLM's schedulers, which also end requests that the model runner reports as failed.

They pass the counts of the expert cache on as well (``expert_cache_stats``).

Everything else is vLLM's. A failed request ends like an aborted one, its pages are freed, and
its answer has the finish reason ``error``, with the sentence as stop reason. vLLM's server turns
that into status 500, or an error event in a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import RequestStatus

from vllm_moe_compat.backend.vllm.expert_cache_stats import CountsSinceLastStep, put_in
from vllm_moe_compat.backend.vllm.front_end_stats import is_logged
from vllm_moe_compat.backend.vllm.step_output import Failure


class MlxScheduler(Scheduler):
    """Ends failed requests, and reports the counts of the expert cache."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's ``Scheduler``."""
        super().__init__(*args, **kwargs)
        self._expert_counts = CountsSinceLastStep()

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        """Apply the output of a step; failed requests end before it and get no token of it."""
        self._expert_counts.add(getattr(model_runner_output, "expert_counts", {}))
        failures: Mapping[str, Failure] = getattr(model_runner_output, "failures", {})
        ended = self._end(failures) if failures else []
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        for client, output in ended:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Add what the expert cache has counted to vLLM's statistics."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and is_logged(self.vllm_config):
            put_in(stats, self._expert_counts.take())
        return stats

    def _end(self, failures: Mapping[str, Failure]) -> list[tuple[int, EngineCoreOutput]]:
        """End the requests, take tainted pages out of the prefix cache, return the answers."""
        running = {req_id for req_id in failures if req_id in self.requests}
        for req_id in running:
            if pages := failures[req_id].pages:
                # Those that it has now, and those that it had before a preemption.
                groups = self.kv_cache_manager.get_block_ids(req_id)
                held = {block for group in groups for block in group}
                self.kv_cache_manager.evict_blocks(held | pages)
        return [
            (
                request.client_index,
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=failures[request.request_id].reason,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                ),
            )
            for request in self.finish_requests(running, RequestStatus.FINISHED_ERROR)
        ]


class MlxAsyncScheduler(MlxScheduler, AsyncScheduler):
    """Ends failed requests under async scheduling."""
