"""A real checkpoint through vLLM with the backend of this machine: offline and over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.engine import in_process_llm
from support.server import Server, start, stop, wait
from vllm_moe_compat.who_serves import who_serves

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(3600)]

PROMPT = "The first rule is"
LOAD_SECONDS = 1800
"""Time limit of the start: a checkpoint of a hundred gigabytes is read and dequantised."""


def greedy(prompt: str, count: int) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": count}


# --- LLM() -------------------------------------------------------------------


@pytest.fixture(scope="module")
def offline(smoke_model: Path, cache_bytes: int) -> Iterator[Any]:
    with in_process_llm(smoke_model, kv_cache_memory_bytes=cache_bytes) as llm:
        yield llm


def complete(llm: Any, prompt: str, count: int, **more: Any) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, **more)
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]


def test_offline_greedy_repeats_itself(offline: Any) -> None:
    first, second = (complete(offline, PROMPT, 24, ignore_eos=True) for _ in range(2))
    assert len(first.token_ids) == 24
    assert list(first.token_ids) == list(second.token_ids)


def test_offline_golden_text(offline: Any, golden: dict[str, Any]) -> None:
    assert complete(offline, golden["prompt"], golden["max_tokens"]).text == golden["text"]


# --- HTTP --------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(
    smoke_model: Path, cache_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("smoke") / "server.log"
    running = start(smoke_model, log, "--kv-cache-memory-bytes", str(cache_bytes))
    try:
        wait(running, LOAD_SECONDS)
        yield running
    finally:
        stop(running)
    if who_serves()[0] == "embedded":
        assert "worker shut down" in running.log, "the worker's clean-up must run"


def test_the_log_says_what_was_found_and_who_serves(server: Server, smoke_model: Path) -> None:
    ours = [line for line in server.log.splitlines() if "moe_compat: " in line]
    assert any(f"moe_compat: {smoke_model} (mlx_lm.models." in line for line in ours), ours
    assert not [line for line in ours if "WARNING" in line or "ERROR" in line]
    assert any(" serves, since " in line for line in ours), ours
    if who_serves()[0] == "embedded":
        assert any("the embedded MLX platform serves" in line for line in ours), ours
        assert any("for pages" in line for line in ours), ours


def test_http_greedy_repeats_itself_and_counts_its_tokens(server: Server) -> None:
    body = greedy(PROMPT, 24) | {"ignore_eos": True}
    answers = [server.request("/v1/completions", body) for _ in range(2)]
    first, second = (answer["choices"][0]["text"] for answer in answers)
    assert first
    assert first == second
    assert answers[0]["usage"]["completion_tokens"] == 24


def test_http_streaming_gives_the_same_text(server: Server) -> None:
    whole = server.request("/v1/completions", greedy(PROMPT, 24))["choices"][0]["text"]
    chunks = server.stream("/v1/completions", greedy(PROMPT, 24))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == whole


def test_http_golden_text(server: Server, golden: dict[str, Any]) -> None:
    body = greedy(golden["prompt"], golden["max_tokens"])
    assert server.request("/v1/completions", body)["choices"][0]["text"] == golden["text"]
