"""The output of a step, with the requests that failed in it.

vLLM's ``ModelRunnerOutput`` cannot say that one request failed: its model runners raise, and the
engine ends with all requests. Ours names the request and the reason, and the scheduler
(``scheduler``) ends that request alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.outputs import ModelRunnerOutput


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of one request.

    Attributes:
        reason: one sentence.
        pages: the blocks of the request, if they may hold NaN or values of other tokens; nobody
            may find them in the prefix cache.
    """

    reason: str
    pages: frozenset[int] = frozenset()


@dataclass
class StepOutput(ModelRunnerOutput):
    """vLLM's output and the failures of the step.

    Attributes:
        failures: request id → its failure. Such a request has no tokens in this output.
        expert_counts: count → total of the expert cache since the engine's start; empty
            without one.
    """

    failures: dict[str, Failure] = field(default_factory=dict)
    expert_counts: dict[str, float] = field(default_factory=dict)
