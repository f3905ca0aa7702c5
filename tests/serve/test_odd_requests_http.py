"""Requests that cannot be computed, over HTTP: each gets an error, the others their answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from support import odd_requests
from support.engine import Greedy
from support.odd_requests import BEYOND, NAN, ROWS
from support.server import Server, serve

pytestmark = [pytest.mark.serve, pytest.mark.full]

SETTINGS = ("--max-model-len", "256", "--max-logprobs", "9999", "--max-num-batched-tokens", "64")


@pytest.fixture(scope="module")
def checkpoint(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_requests.write(tmp_path_factory.mktemp("odd") / "model", demo_path)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Newer releases offer ids in, ids out by request only.
    arguments = SETTINGS + (("--enable-scale-out",) if _asks_for_scale_out() else ())
    with serve(checkpoint, tmp_path_factory.mktemp("serve") / "log", *arguments) as server:
        yield server
    # A traceback would be an exception in a step.
    engine = [line for line in server.log.splitlines() if "EngineCore pid" in line]
    assert not [line for line in engine if "Traceback" in line]
    assert "EngineDeadError" not in server.log


def _asks_for_scale_out() -> bool:
    return find_spec("vllm.entrypoints.launchers") is not None


def body(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 8} | more


NAMES = f"{BEYOND}, and the model's embeddings have {ROWS} rows"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", body([7, BEYOND]), NAMES),
    ("/v1/completions", body([[7, 8], [7, BEYOND]]), NAMES),
    ("/v1/completions", body("Zen <mine>", stream=True), NAMES),
    ("/v1/completions", body("Zen <mine>", n=2, temperature=1), NAMES),
    ("/v1/completions", body("Zen <mine>", echo=True, logprobs=1), NAMES),
    ("/v1/completions", body([7], prompt_logprobs=ROWS + 1), f"the model has {ROWS} tokens"),
    ("/v1/completions", body([7], logprobs=ROWS + 1), f"the model has {ROWS} tokens"),
    ("/v1/completions", body([7], allowed_token_ids=[BEYOND]), str(BEYOND)),
    ("/v1/completions", body([7], stop_token_ids=[BEYOND]), str(BEYOND)),
    ("/v1/completions", body([7], logit_bias={str(BEYOND): 1}), str(BEYOND)),
    ("/v1/completions", body([7, -1]), "-1"),
    (
        "/v1/chat/completions",
        {"model": "demo", "messages": [{"role": "user", "content": "<mine>"}]},
        NAMES,
    ),
    ("/v1/responses", {"model": "demo", "input": "<mine>"}, NAMES),
    (
        "/inference/v1/generate",
        {"model": "demo", "token_ids": [7, BEYOND], "sampling_params": {"max_tokens": 3}},
        NAMES,
    ),
]
DEAD_END = {"allowed_token_ids": [77], "stop_token_ids": [77], "min_tokens": 2}
ENDED: list[dict[str, Any]] = [
    body([7, NAN, 8]),
    body([7] * 70 + [NAN]),
    body([7, NAN], temperature=1, n=2),
    body([7, NAN], prompt_logprobs=1),
    body([7, NAN, 8], logprobs=2),
    body([7], allowed_token_ids=[NAN]),
    body([7], **DEAD_END),
]


def test_odd_requests_among_good_ones(server: Server, checkpoint: Path) -> None:
    reference = Greedy(checkpoint)
    draw = random.Random(1)

    def good(prompt: list[int]) -> None:
        answer = server.request("/v1/completions", body(prompt, return_token_ids=True))
        assert answer["choices"][0]["token_ids"] == reference.tokens(prompt, 8)

    def refused(path: str, request: dict[str, Any], words: str) -> None:
        status, error = server.status(path, request)
        if request.get("stream"):  # Begun before vLLM checks a request.
            event = json.loads(str(error).splitlines()[0].removeprefix("data: "))
            status, error = event["error"]["code"], event
        assert status == 400, (path, request, error)
        assert words in json.dumps(error), (path, request, error)

    def ended(request: dict[str, Any]) -> None:
        status, error = server.status("/v1/completions", request)
        assert status == 500, (request, error)
        assert "Internal server error" in json.dumps(error)

    prompts = [[draw.choice(odd_requests.PLAIN) for _ in range(30)] for _ in range(20)]
    for prompt in prompts:
        reference.tokens(prompt, 8)  # Known before, since MLX computes on one thread.
    work: list[tuple[Any, tuple[Any, ...]]] = [
        *((good, (prompt,)) for prompt in prompts),
        *((refused, case) for case in REFUSED),
        *((ended, (request,)) for request in ENDED),
    ]
    draw.shuffle(work)
    with ThreadPoolExecutor(6) as pool:
        for result in [pool.submit(task, *arguments) for task, arguments in work]:
            result.result()
    good(prompts[0])


def test_a_stream_ends_with_an_error_event(server: Server) -> None:
    *_, last = server.stream("/v1/completions", body([7], allowed_token_ids=[NAN]))
    assert last["error"]["code"] == 500


def test_the_log_gives_the_reason(server: Server) -> None:
    server.status("/v1/completions", body([7, NAN]))
    server.status("/v1/completions", body([7], **DEAD_END))
    log = server.log
    assert "ends with an error: the model's logits are NaN or infinite" in log
    assert "ends with an error: no token is left to draw" in log
    assert log.count("the tokenizer has ids up to") == 1
    assert "custom scheduler" not in log
