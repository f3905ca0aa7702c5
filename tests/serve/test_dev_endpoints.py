"""Every endpoint of a server in vLLM's development mode leaves it alive and exact."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.server import Server, serve

pytestmark = [pytest.mark.serve, pytest.mark.full]

NOT_SUPPORTED = "The embedded MLX backend does not support "
WORK = {
    # Requests and reads, which the other tests of the server exercise.
    *("/load", "/version", "/kv_event_sources", "/health", "/metrics", "/ping", "/invocations"),
    *("/tokenize", "/detokenize", "/v1/models", "/v1/systemone", "/server_info"),
    *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions"),
    *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"),
    *("/v1/messages", "/v1/messages/count_tokens", "/generative_scoring"),
    *("/v1/chat/completions/render", "/v1/completions/render", "/inference/v1/generate"),
    *("/v1/chat/completions/derender", "/v1/completions/derender"),
    *("/adapters", "/adapters/{adapter_name}", "/get_world_size"),
    *("/is_sleeping", "/is_paused", "/weight_info", "/is_scaling_elastic_ep"),
    # Sleep and pause have tests of their own below.
    *("/sleep", "/wake_up", "/pause", "/resume"),
}
TABLE: list[tuple[str, dict[str, Any], int, str]] = [
    # path, body, status, words of the answer
    ("/reset_prefix_cache", {}, 200, ""),
    ("/reset_mm_cache", {}, 200, ""),
    ("/reset_encoder_cache", {}, 200, ""),
    ("/abort_requests", {}, 200, "aborted"),
    ("/release_kv_cache_memory", {}, 500, "requires a completed pause"),
    ("/start_profile", {}, 500, NOT_SUPPORTED),
    ("/stop_profile", {}, 500, NOT_SUPPORTED),
    ("/init_weight_transfer_engine", {"init_info": {}}, 500, NOT_SUPPORTED),
    ("/shutdown_weight_transfer_engine", {}, 200, ""),
    ("/start_weight_update", {}, 500, NOT_SUPPORTED),
    ("/start_draft_weight_update", {}, 500, NOT_SUPPORTED),
    ("/update_weights", {"update_info": {}}, 500, NOT_SUPPORTED),
    ("/finish_weight_update", {}, 500, NOT_SUPPORTED),
    ("/update_weight_version", {"new_version": "7"}, 200, "7"),
    ("/weight_checker", {"action": "reset"}, 500, NOT_SUPPORTED),
    ("/weight_checker", {"action": "checksum"}, 200, "checksums"),
    ("/collective_rpc", {"method": "nobody_knows_this"}, 500, "is not implemented"),
    ("/collective_rpc", {"method": "sleep"}, 500, "only with vLLM's engine"),
    ("/collective_rpc", {"method": "compile_or_warm_up_model"}, 500, "a step of the start-up"),
    ("/collective_rpc", {"method": "reload_weights"}, 200, ""),
    ("/scale_elastic_ep", {"new_data_parallel_size": 2}, 500, ""),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/nowhere"}, 500, NOT_SUPPORTED),
    ("/v1/unload_lora_adapter", {"lora_name": "a"}, 404, ""),
]


@pytest.fixture(scope="module")
def server(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("dev")
    profiler = {"profiler": "torch", "torch_profiler_dir": str(folder)}
    arguments = ("--enable-sleep-mode", "--profiler-config", json.dumps(profiler))
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serve(demo_path, folder / "server.log", *arguments, env=env) as server:
        yield server


@pytest.fixture(autouse=True)
def _awake(server: Server) -> Iterator[None]:
    """Keep one test's failure from the others."""
    yield
    for path in ("/wake_up", "/resume"):
        assert server.status(path, {})[0] == 200


def ask(server: Server, count: int = 12) -> tuple[str, str]:
    """The answer, and why it ended."""
    body = {
        "model": "demo",
        "prompt": "Beautiful is better",
        "temperature": 0,
        "max_tokens": count,
        "ignore_eos": True,
    }
    choice = server.request("/v1/completions", body, timeout=60)["choices"][0]
    return choice["text"], choice["finish_reason"]


def test_the_table_names_every_endpoint(server: Server) -> None:
    paths = server.request("/openapi.json")["paths"].keys()
    assert paths - WORK - {path for path, *_ in TABLE} == set()


@pytest.mark.parametrize(
    ("path", "body", "status", "words"), TABLE, ids=[f"{p} {b}" for p, b, *_ in TABLE]
)
def test_an_endpoint(
    server: Server, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    if path not in server.request("/openapi.json")["paths"]:
        status, words = 404, "Not Found"  # This release does not have it.
    before = ask(server)
    answer = server.status(path, body)
    assert answer[0] == status, answer
    assert words in str(answer[1])
    assert ask(server) == before


def engine_bytes(server: Server) -> int:
    """Resident bytes of the engine's process, the largest child."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return max(int(child.memory_info().rss) for child in children)


@pytest.mark.parametrize("level", [1, 2])
def test_the_operating_system_gets_the_memory(server: Server, level: int) -> None:
    before = ask(server)
    awake = engine_bytes(server)
    assert server.status(f"/sleep?level={level}", {})[0] == 200
    assert awake - engine_bytes(server) > 30 << 20, "at least the pages"
    assert server.request("/is_sleeping") == {"is_sleeping": True}
    assert server.request("/health") == ""
    status, error = server.status("/resume", {})
    assert status == 500
    assert "wake it up first" in str(error)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, server)
        assert server.status("/wake_up", {})[0] == 200
        assert waiting.result(timeout=60) == before
    assert server.request("/is_sleeping") == {"is_sleeping": False}


def until_running(server: Server, answer: Future[Any]) -> None:
    end = time.monotonic() + 30
    while not server.metric("vllm:num_requests_running"):
        assert not answer.done(), answer.result()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("mode", "reason"), [("abort", "abort"), ("wait", "length"), ("keep", "length")]
)
@pytest.mark.parametrize("call", ["sleep", "pause"])
def test_requests_that_run_meanwhile(server: Server, call: str, mode: str, reason: str) -> None:
    alone, _ = ask(server, 600)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server, 600)
        until_running(server, running)
        assert server.status(f"/{call}?mode={mode}", {})[0] == 200
        assert running.done() or mode == "keep" or running.result(timeout=10)
        assert server.status("/wake_up" if call == "sleep" else "/resume", {})[0] == 200
        text, ended = running.result(timeout=60)
    assert ended == reason
    assert alone.startswith(text)
    assert (text == alone) == (mode != "abort")
    assert ask(server, 600)[0] == alone
