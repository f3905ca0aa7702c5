"""vLLM's schedule of one engine step, independent of vLLM's encoding.

``vllm.scheduler_output`` decodes it from vLLM's ``SchedulerOutput``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that the worker has not seen, or sees again under the same id.

    Attributes:
        req_id: vLLM's id.
        prompt: token ids.
        params: ``vllm.SamplingParams``.
        blocks: block ids, one list per KV group.
        computed: tokens whose keys, values and states are cached already (a prefix hit).
    """

    req_id: str
    prompt: list[int]
    params: Any
    blocks: tuple[list[int], ...]
    computed: int


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request that the worker knows.

    Attributes:
        req_id: vLLM's id.
        computed: tokens computed before this step.
        num_output: generated tokens that the scheduler counts; later ones are discarded.
        blocks: block ids added, one list per KV group; None if there are none.
        resumed: the request was preempted, and ``blocks`` replace all earlier ones.
    """

    req_id: str
    computed: int
    num_output: int
    blocks: tuple[list[int], ...] | None
    resumed: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """One engine step.

    Attributes:
        finished: ids of requests that ended.
        new: requests that begin.
        running: requests that continue; preempted ones are absent.
        scheduled: request id → number of known tokens computed in this step.
        page_copies: (source block, destination block) of vLLM's copy-on-write.
        drafts: request id → proposed tokens that this step verifies, after the last known one;
            -1 stands for none.
    """

    finished: frozenset[str]
    new: tuple[NewRequest, ...]
    running: tuple[RunningRequest, ...]
    scheduled: dict[str, int]
    page_copies: tuple[tuple[int, int], ...]
    drafts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def assigned_blocks(self) -> set[int]:
        """Return every block that this step assigns to some request."""
        tables = [request.blocks for request in self.new]
        tables += [request.blocks for request in self.running if request.blocks is not None]
        return {block for table in tables for group in table for block in group}
