"""Random schedules: arrival times, prompts and aborts of requests.

A schedule is plain data made from a seed, so that a failure prints what
happened and the seed brings it back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.engine import Greedy, engine_core, in_process_llm, worker

# Ways to leave one choice, half of them drawn in MLX and half by vLLM's sampler.
ONE_CHOICE: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1, "top_k": 1},
    {"temperature": 0, "logprobs": 1},
    {"temperature": 1, "top_p": 1e-6},
    {"temperature": 1, "top_k": 1, "seed": 3},
    {"temperature": 0, "min_tokens": 1},
)


@dataclass(frozen=True)
class Arrival:
    """One request of a schedule."""

    req_id: str
    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    abort_after: int | None  # steps after its arrival
    sampling: int = 0  # which of ONE_CHOICE

    def __str__(self) -> str:
        end = f", aborted after {self.abort_after} steps" if self.abort_after is not None else ""
        return (
            f"step {self.step:3d}: {self.req_id} with {len(self.prompt)} tokens "
            f"(first {self.prompt[:4]}), {self.max_tokens} to generate by "
            f"{ONE_CHOICE[self.sampling]}{end}"
        )


def make(
    seed: int, block: int, requests: int = 10, longest: int = 333, output: int = 24
) -> list[Arrival]:
    """Draw a schedule: short and long prompts, shared prefixes that end at block
    edges (-1, 0, +1), divergent suffixes, verbatim repeats, aborts.
    """
    draw = random.Random(seed)
    documents = [[draw.randrange(5, 500) for _ in range(longest)] for _ in range(3)]
    arrivals: list[Arrival] = []
    step = 0
    for number in range(requests):
        document = draw.choice(documents)
        kind = draw.choice(["edge", "edge", "divergent", "repeat", "any", "tiny"])
        if kind == "edge":
            at = block * draw.randint(1, max(1, longest // block - 1)) + draw.choice([-1, 0, 1])
            prompt = document[: min(at, longest)]
        elif kind == "divergent":
            cut = draw.randint(1, longest - 40)
            prompt = document[:cut] + [draw.randrange(5, 500) for _ in range(draw.randint(1, 40))]
        elif kind == "repeat" and arrivals:
            prompt = list(draw.choice(arrivals).prompt)
        elif kind == "tiny":
            prompt = document[: draw.randint(3, 8)]
        else:
            prompt = document[: draw.randint(3, longest)]
        abort = draw.randint(0, 12) if draw.random() < 0.2 else None
        # Every second schedule is greedy from end to end.
        way = number % len(ONE_CHOICE) if seed % 2 else 0
        arrivals.append(
            Arrival(f"r{number}", step, tuple(prompt), draw.randint(1, output), abort, way)
        )
        step += draw.choice([0, 0, 1, 2, 7])
    return arrivals


def describe(seed: int, arrivals: list[Arrival]) -> str:
    """Format a schedule for a failure message."""
    return "\n".join([f"schedule {seed}:", *(f"  {arrival}" for arrival in arrivals)])


@dataclass
class Played:
    """The result of a schedule."""

    tokens: dict[str, list[int]]  # of who finished
    cached: int = 0  # prompt tokens taken from the prefix cache
    preemptions: int = 0


def play(llm: Any, arrivals: list[Arrival], limit: int = 3000) -> Played:
    """Drive vLLM's engine through a schedule."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    engine = llm.llm_engine
    waiting = list(arrivals)
    aborts = {
        arrival.req_id: arrival.step + arrival.abort_after
        for arrival in arrivals
        if arrival.abort_after is not None
    }
    internal: dict[str, str] = {}
    played = Played({})
    scheduler = engine_core(llm).scheduler
    step = 0
    while waiting or engine.has_unfinished_requests():
        assert step < limit, (
            f"no end after {limit} steps; unfinished: {set(internal) - set(played.tokens)}"
        )
        while waiting and waiting[0].step <= step:
            arrival = waiting.pop(0)
            params = SamplingParams(
                max_tokens=arrival.max_tokens,
                ignore_eos=True,
                detokenize=False,
                **ONE_CHOICE[arrival.sampling],
            )
            prompt = TokensPrompt(prompt_token_ids=list(arrival.prompt))
            internal[arrival.req_id] = engine.add_request(arrival.req_id, prompt, params)
        for req_id, when in list(aborts.items()):
            if when <= step and req_id in internal:
                engine.abort_request([internal[req_id] or req_id], internal=True)
                del aborts[req_id]
        before = {request.request_id for request in scheduler.running}
        for output in engine.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                played.tokens[output.request_id] = list(output.outputs[0].token_ids)
                played.cached += output.num_cached_tokens or 0
        # Preempted requests give their states back like their pages.
        for held in llm.collective_rpc("occupancy"):
            assert held["states"] <= scheduler.max_num_running_reqs
        waiting_again = {request.request_id for request in scheduler.waiting}
        played.preemptions += len(before & waiting_again)
        step += 1
    return played


def check(
    name: str,
    path: Path,
    settings: dict[str, Any],
    greedy: Greedy,
    schedule_budget: int,
    *,
    prepare: Callable[[Any], None] = lambda llm: None,
    sure: bool = True,
    **sizes: int,
) -> None:
    """Play schedules; every answer equals the reference, and all blocks and states are freed.

    Args:
        name: of the settings, whose words say what they have to bring about.
        path: of the model.
        settings: of the engine.
        greedy: the reference.
        schedule_budget: number of schedules.
        prepare: is given the engine.
        sure: what the name says has to happen; else some of it.
        sizes: of the schedules.
    """
    with in_process_llm(path, **settings) as llm:
        prepare(llm)
        block = worker(llm).cache_config.block_size
        cached = preemptions = 0
        for seed in range(schedule_budget):
            arrivals = make(seed, block, **sizes)
            played = play(llm, arrivals)
            done = played.tokens
            cached += played.cached
            preemptions += played.preemptions
            for arrival in arrivals:
                if arrival.req_id in done:
                    want = greedy.tokens(arrival.prompt, arrival.max_tokens)
                    assert done[arrival.req_id] == want, (
                        f"{name}: {arrival.req_id} differs\n{describe(seed, arrivals)}"
                    )
            assert len(done) >= len([a for a in arrivals if a.abort_after is None])
            pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
            llm.llm_engine.step()
            runner = worker(llm).runner
            assert not runner.storage.states.resident - set(runner.batch.requests)
            if "prefix" in name and seed == 0:
                # Refused by vLLM unless every block was given back.
                assert llm.reset_prefix_cache()
        # The setting did what it is there for.
        assert cached == 0 or "prefix" in name
        if sure:
            assert cached > 0 or "prefix" not in name
            assert preemptions > 0 or "starved" not in name
        else:
            assert cached + preemptions > 0
