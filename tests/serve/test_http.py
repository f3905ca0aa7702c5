"""A real ``vllm serve`` over HTTP."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.engine import Greedy
from support.processes import gone
from support.server import Server, serve, start, stop

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def server(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "server.log"
    # Few tokens per step: longer prompts are computed in chunks beside decodes.
    chunks = ("--max-num-batched-tokens", "48", "--max-num-seqs", "12")
    arguments = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", *chunks)
    with serve(demo_path, log, *arguments) as server:
        yield server
    assert "worker shut down" in server.log, "the worker's clean-up must run"
    engine = [line for line in server.log.splitlines() if "EngineCore pid" in line]
    assert not [line for line in engine if "Traceback" in line or "ERROR" in line]
    assert gone(server.process.pid), "no process of the server may outlive it"


@pytest.fixture(scope="module")
def golden(demo_path: Path) -> dict[str, Any]:
    return dict(json.loads((demo_path / "golden.json").read_text()))


def completion(prompt: Any, **body: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 24} | body


def test_the_log_says_what_was_found_and_who_serves(server: Server) -> None:
    lines = [line for line in server.log.splitlines() if "moe_compat: " in line]
    text = "\n".join(lines)
    assert "qwen3_5_moe" in text
    assert "8 experts" in text
    assert "dequantised" in text
    assert "embedded MLX platform" in text
    assert "for pages" in text
    assert "WARNING" not in text


def test_golden_text(server: Server, golden: dict[str, Any]) -> None:
    body = completion(golden["prompt"], max_tokens=golden["max_tokens"])
    answer = server.request("/v1/completions", body)
    assert answer["choices"][0]["text"] == golden["text"]
    assert answer["usage"]["completion_tokens"] == golden["max_tokens"]


def test_streaming_gives_the_same_text_in_pieces(server: Server, golden: dict[str, Any]) -> None:
    body = completion(golden["prompt"], max_tokens=golden["max_tokens"])
    body["stream_options"] = {"include_usage": True}
    chunks = list(server.stream("/v1/completions", body))
    pieces = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
    assert "".join(pieces) == golden["text"]
    assert len(pieces) > 5
    assert chunks[-1]["usage"]["completion_tokens"] == golden["max_tokens"]


def test_chat(server: Server) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Beautiful is better than"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    answer = server.request("/v1/chat/completions", body)
    text = answer["choices"][0]["message"]["content"]
    assert text
    pieces = [
        chunk["choices"][0]["delta"].get("content") or ""
        for chunk in server.stream("/v1/chat/completions", body)
    ]
    assert "".join(pieces) == text


def test_a_tool_call_comes_back_parsed(server: Server) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Which rule comes first?"}],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "look_up",
                    "parameters": {
                        "type": "object",
                        "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 19}},
                        "required": ["number"],
                        "additionalProperties": False,
                    },
                },
            }
        ],
        # What a model trained on tools would say of its own accord.
        "structured_outputs": {
            "regex": r'<tool_call>\n\{"name": "look_up", "arguments": \{"number": 1?[1-9]\}\}\n'
            r"</tool_call>"
        },
        "max_tokens": 200,
        "temperature": 0,
    }
    answer = server.request("/v1/chat/completions", body)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "look_up"
    assert 1 <= json.loads(call["function"]["arguments"])["number"] <= 19


def test_eight_at_once_are_each_as_if_alone(
    server: Server, demo_path: Path, greedy: Greedy
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_path)
    texts = [
        "Beautiful is better than",
        "Explicit",
        "In the face of ambiguity, refuse the temptation",
        "Now is better than never.\nAlthough never is often better",
        "Errors should never pass silently.\nUnless",
        "If the implementation is hard to explain,",
        "There should be one-- and preferably only one --obvious way to do it.\n" * 6,
        "Namespaces are one honking great idea",
    ]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def ask(prompt: list[int]) -> list[int]:
        body = completion(prompt, max_tokens=32, ignore_eos=True, return_token_ids=True)
        choice = server.request("/v1/completions", body)["choices"][0]
        return list(choice["token_ids"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [greedy.tokens(prompt, 32) for prompt in prompts]


def test_a_client_that_hangs_up_frees_its_request(server: Server) -> None:
    body = completion("Beautiful", max_tokens=900, ignore_eos=True, stream=True)
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    answer = urllib.request.urlopen(request, timeout=60)
    answer.readline()
    assert server.metric("vllm:num_requests_running") <= 1
    answer.close()
    end = time.monotonic() + 5
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.request("/v1/completions", completion("Explicit"))["choices"][0]["text"]


def test_metrics_count_tokens(server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total")
    server.request("/v1/completions", completion("Explicit", max_tokens=5, ignore_eos=True))
    # The engine reports its counters a moment after the answer.
    end = time.monotonic() + 5
    while server.metric("vllm:generation_tokens_total") < before + 5 and time.monotonic() < end:
        time.sleep(0.1)
    assert server.metric("vllm:generation_tokens_total") == before + 5


def test_what_is_not_served_is_refused_by_name(server: Server) -> None:
    status, error = server.status("/v1/completions", completion("x", max_tokens=5000))
    assert status == 400
    assert "1024" in json.dumps(error)
    status, error = server.status("/v1/completions", completion([7, 8], logprobs=5000))
    assert status == 400
    status, error = server.status("/v1/completions", completion([7, 512, 8]))
    assert status == 400
    assert "512" in json.dumps(error)
    assert "custom scheduler" not in server.log
    # And the server goes on.
    assert server.request("/v1/completions", completion("Explicit"))["choices"]


@pytest.mark.full
def test_a_broken_checkpoint_stops_the_server_with_one_sentence(
    demo_path: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in demo_path.iterdir():
        (broken / file.name).symlink_to(file)
    shard = sorted(broken.glob("model-*.safetensors"))[0]
    shard.unlink()
    server = start(broken, tmp_path / "log")
    timer = threading.Timer(120, server.process.kill)
    timer.start()
    try:
        assert server.process.wait() != 0
    finally:
        timer.cancel()
        stop(server)
    assert shard.name in server.log
    assert "CheckpointFileError" in server.log
