"""vLLM's own OpenAPI schema, as random requests against a real server.

schemathesis draws bodies that fit the schema, and bodies that do not. What would only be refused at
the door is mended, so that requests reach the engine: the model's name, lengths that would take
minutes, and, of every other body, all but a few fields beside a plain question. Whatever comes, the
server answers in time, without an error of its own, and the engine gives a known greedy answer
afterwards.

Elastic expert parallelism is left out: it restarts engines. Developers' endpoints are off, as they
are by default.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
from hypothesis import HealthCheck, Phase

from support.server import Server, serve

pytestmark = [pytest.mark.serve, pytest.mark.full, pytest.mark.timeout(3600)]

LEFT_OUT = ("/scale_elastic_ep", "/is_scaling_elastic_ep")
SECONDS = 60.0
"""For one answer; those below take a fraction of a second alone."""
BOUNDS = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), 8),
    **{"n": 3, "best_of": 3, "logprobs": 5, "top_logprobs": 5, "prompt_logprobs": 5},
}


@dataclass(frozen=True)
class Known:
    """An error 5xx that vLLM gives by itself, before the engine sees the request."""

    path: str
    words: str
    reason: str

    def covers(self, path: str, text: str) -> bool:
        return path == self.path and re.search(self.words, text) is not None


MESSAGES = [{"role": "user", "content": "Hello"}]
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Beautiful is"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES]},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/generative_scoring": {"query": "Hello", "items": ["a", "b"], "label_token_ids": [5, 6]},
    "/tokenize": {"prompt": "Hello"},
}
"""Requests that are answered, on which single fields are tried."""

VLLMS_OWN: tuple[Known, ...] = (
    Known(
        "/v1/systemone",
        "does not support the structured decision API",
        "vLLM refuses it with 501 for models that were not made for it",
    ),
)


@dataclass
class Outcome:
    """What was sent to one operation, and what came back."""

    statuses: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def server(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("api") / "server.log"
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with serve(demo_path, log, *tools, "--max-num-seqs", "8") as server:
        yield server
    assert "worker shut down" in server.log


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    import schemathesis

    return schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


@pytest.fixture(scope="module")
def golden(demo_path: Path) -> dict[str, Any]:
    return dict(json.loads((demo_path / "golden.json").read_text()))


def admitted(path: str, body: Any) -> Any:
    """The body with the served model's name, and with lengths that take no minutes."""
    if not isinstance(body, dict):
        return body
    rng = random.Random(repr(body))
    if path in PLAIN and rng.random() < 0.5:
        few = rng.sample(sorted(body, key=str), min(len(body), rng.randint(1, 3)))
        body = PLAIN[path] | {name: body[name] for name in few if name not in PLAIN[path]}
    body = body | {"model": "demo"}
    for name, most in BOUNDS.items():
        value = body.get(name)
        if isinstance(value, int) and value > most:
            body[name] = most
    for name in ("max_tokens", "max_output_tokens"):
        body.setdefault(name, 8)
    return body


def attack(operation: Any, examples: int, seed: int) -> Outcome:
    """Send random requests to one operation, half of them outside the schema."""
    from schemathesis import GenerationMode

    outcome = Outcome()

    def send(case: Any) -> None:
        case.body = admitted(operation.path, case.body)
        try:
            answer = case.call(timeout=SECONDS)
        except requests.RequestException as error:
            outcome.faults.append(f"{error!r} for {case.body!r}"[:600])
            return
        status = answer.status_code
        outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
        own = any(known.covers(operation.path, answer.text) for known in VLLMS_OWN)
        if status >= 500 and not own:
            outcome.faults.append(f"{status} {answer.text[:300]} for {case.body!r}"[:900])

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        drawn = hypothesis.given(case=operation.as_strategy(generation_mode=mode))(send)
        bounded = hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        nothing_is_wrong = hypothesis.errors.Unsatisfiable  # Without a body, or with any string.
        wrong = mode is GenerationMode.NEGATIVE
        with contextlib.suppress(nothing_is_wrong) if wrong else contextlib.nullcontext():
            hypothesis.seed(seed)(bounded(drawn))()
    return outcome


def test_random_requests_harm_nobody(
    schema: Any, server: Server, golden: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    examples = int(request.config.getoption("--api-examples"))
    question = {"model": "demo", "temperature": 0} | {
        name: golden[name] for name in ("prompt", "max_tokens")
    }
    faults: list[str] = []
    for number, result in enumerate(schema.get_all_operations()):
        operation = result.ok()
        if operation.path in LEFT_OUT:
            continue
        outcome = attack(operation, examples, number)
        print(operation.method.upper(), operation.path, outcome.statuses, flush=True)
        faults += [f"{operation.method} {operation.path}: {fault}" for fault in outcome.faults]
        answer = server.request("/v1/completions", question)
        assert answer["choices"][0]["text"] == golden["text"], operation.path
    assert "EngineDeadError" not in server.log
    assert not faults, "\n".join(faults)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
