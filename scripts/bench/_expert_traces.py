"""What passes want of one layer's experts: made up, and the fewest misses it allows.

A trace is a list of passes, each the distinct experts that it wants and how many of its tokens
chose each. Routing is made up from scores per token: ``prior`` spreads the experts' popularity by
Zipf's law, ``topic`` gives every request a preference of its own, and ``sticky`` is the
correlation of what is left from token to token. Each is a weight beside noise of spread 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
NEVER = 2**60


@dataclass(frozen=True)
class Pass:
    """One pass: ``wanted`` ascending [W], ``uses`` of each [W]."""

    wanted: Ints
    uses: Ints
    prefill: bool = False


@dataclass(frozen=True)
class Routing:
    """How tokens choose among experts."""

    prior: float = 0.0
    topic: float = 0.0
    sticky: float = 0.0


ROUTINGS = {
    "uniform": Routing(),
    "skewed": Routing(prior=0.7),
    "by request": Routing(prior=0.3, topic=1.0),
    "sticky": Routing(prior=0.3, topic=0.7, sticky=0.8),
}


def make(
    routing: Routing,
    *,
    batch: int,
    prefill: int,
    passes: int,
    every: int = 24,
    experts: int = 256,
    chosen: int = 8,
    seed: int = 0,
) -> list[Pass]:
    """Decode passes of ``batch`` requests; every so often a new one's prompt takes a place.

    Args:
        prefill: tokens of a prompt, in a pass of its own; 0 for none.
        every: decode passes from one prompt to the next.
    """
    draw = np.random.default_rng(seed)
    prior = draw.permutation(-routing.prior * np.log(np.arange(1, experts + 1)))

    class Request:
        def __init__(self) -> None:
            self.liked = prior + routing.topic * draw.standard_normal(experts)
            self.state = draw.standard_normal(experts)

        def token(self) -> Ints:
            fresh = draw.standard_normal(experts)
            self.state = routing.sticky * self.state + (1 - routing.sticky**2) ** 0.5 * fresh
            best: Ints = np.argpartition(-(self.liked + self.state), chosen)[:chosen]
            return best

    def counted(tokens: list[Ints], prompt: bool) -> Pass:
        wanted, uses = np.unique(np.concatenate(tokens), return_counts=True)
        return Pass(wanted, uses, prompt)

    running = [Request() for _ in range(batch)]
    trace = []
    for number in range(passes):
        if prefill and number % every == every - 1:
            new = Request()
            running[int(draw.integers(batch))] = new
            trace.append(counted([new.token() for _ in range(prefill)], True))
        trace.append(counted([request.token() for request in running], False))
    return trace


def fewest(trace: list[Pass], slots: int) -> int:
    """Misses of Belady's policy, which keeps what is wanted again soonest."""
    uses: dict[int, list[int]] = {}
    for number in range(len(trace) - 1, -1, -1):
        for expert in trace[number].wanted.tolist():
            uses.setdefault(expert, []).append(number)
    held: set[int] = set()
    misses = 0
    for one in trace:
        wanted = set(one.wanted.tolist())
        misses += len(wanted - held)
        for expert in wanted:
            uses[expert].pop()
        held |= wanted
        held = set(sorted(held, key=lambda e: uses[e][-1] if uses[e] else NEVER)[:slots])
    return misses


def first_in_first_out(trace: list[Pass], slots: int) -> int:
    """Misses of the policy that evicts what has been held longest."""
    queue: list[int] = []
    misses = 0
    for one in trace:
        missing = [expert for expert in one.wanted.tolist() if expert not in queue]
        misses += len(missing)
        queue = (queue + missing)[-slots:]
    return misses
