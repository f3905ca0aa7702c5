"""``--data-parallel-size``: independent engines behind one front end."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.engine import Greedy, in_process_llm
from support.processes import gone, group
from support.server import Server, start, stop, wait

pytestmark = [pytest.mark.serve]

PATIENCE = 500  # seconds, for six processes that start on two busy cores
WORDS = (
    *("Beautiful", "Explicit", "Simple", "Complex", "Flat", "Sparse", "Readability", "Special"),
    *("Errors", "Now", "Never", "Hard", "Easy", "Namespaces", "Practicality", "Refuse"),
)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data_parallel_rank": 1}, "--data-parallel-rank or"),
        ({"data_parallel_external_lb": True, "data_parallel_rank": 0}, "or --data-parallel-ext"),
        ({"data_parallel_size_local": 2, "data_parallel_hybrid_lb": True}, "--data-parallel-hyb"),
        ({"data_parallel_size_local": 2, "data_parallel_start_rank": 2}, "without --headless"),
        ({"enable_expert_parallel": True}, "expert parallelism"),
        ({"tensor_parallel_size": 2}, "several engines of several ranks"),
        ({"enable_mfu_metrics": True}, "--enable-mfu-metrics"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_refused_by_name(demo_path: Path, settings: dict[str, Any], words: str) -> None:
    from vllm import AsyncEngineArgs

    size = 2 * settings.get("data_parallel_size_local", 1)
    arguments = AsyncEngineArgs(model=str(demo_path), data_parallel_size=size, **settings)
    with pytest.raises(ValueError, match=words):
        arguments.create_engine_config()


def test_ray_is_refused_by_name(demo_path: Path) -> None:
    from vllm import AsyncEngineArgs

    from vllm_moe_compat.backend.vllm import refusals

    config = AsyncEngineArgs(model=str(demo_path), data_parallel_size=2).create_engine_config()
    assert refusals.first(config) is None
    config.parallel_config.data_parallel_backend = "ray"  # vLLM asks for Ray itself without it
    assert "--data-parallel-backend ray" in str(refusals.first(config))


def test_offline_engines_need_no_common_size(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SIZE": "2", "RANK": "0", "RANK_LOCAL": "0"}.items():
        monkeypatch.setenv(f"VLLM_DP_{name}", value)
    with pytest.raises(ValueError, match="VLLM_DP_SIZE"), in_process_llm(demo_path):
        pass


def test_vllm_is_told_of_no_experts_once(demo_path: Path) -> None:
    from vllm import AsyncEngineArgs

    from vllm_moe_compat.backend.vllm import data_parallel
    from vllm_moe_compat.backend.vllm.platform import MlxPlatform

    one = AsyncEngineArgs(model=str(demo_path)).create_engine_config()
    assert one.model_config.is_moe
    assert data_parallel.local_engines(one) == ("", 1)
    config = AsyncEngineArgs(model=str(demo_path), data_parallel_size=2).create_engine_config()
    assert not config.model_config.is_moe
    name, engines = data_parallel.local_engines(config)
    assert engines == 2
    MlxPlatform.check_and_update_config(config)
    # What vLLM does in the engine's process.
    config.parallel_config.data_parallel_size = config.parallel_config.data_parallel_size_local = 1
    MlxPlatform.check_and_update_config(config)
    assert data_parallel.local_engines(config) == (name, 2)


def ask(server: Server, prompt: str) -> str:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    return str(server.request("/v1/completions", body)["choices"][0]["text"])


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["", "ngram", "mtp"])
def test_two_engines_share_the_requests_and_answer_as_one(
    demo_path: Path, tmp_path: Path, greedy: Greedy, method: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_path)
    prompts = [f"{word} is better than" for word in WORDS]
    log = tmp_path / "log"
    arguments = ["--data-parallel-size", "2", "--api-server-count", "1"]
    if method:
        # Each engine has drafts of its own.
        drafts = {"method": method, "num_speculative_tokens": 2}
        drafts |= {"prompt_lookup_max": 2} if method == "ngram" else {}
        arguments += ["--speculative-config", json.dumps(drafts)]
    server = start(demo_path, log, *arguments, env={"VLLM_MOE_COMPAT_PARK_DRAFTS": "0"})
    try:
        wait(server, PATIENCE)
        with ThreadPoolExecutor(16) as pool:
            texts = list(pool.map(lambda prompt: ask(server, prompt), prompts))
        for prompt, text in zip(prompts, texts, strict=True):
            tokens = greedy.tokens(tokenizer(prompt)["input_ids"], 24)
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        for engine in (0, 1):
            lines = str(server.request("/metrics")).splitlines()
            mine = [x for x in lines if x.startswith("vllm:request_success_total{")]
            mine = [x for x in mine if f'engine="{engine}"' in x]
            assert sum(float(x.rpartition(" ")[2]) for x in mine) >= 4
            accepted = [x for x in lines if x.startswith("vllm:spec_decode_num_accepted_tokens_t")]
            accepted = [x for x in accepted if f'engine="{engine}"' in x]
            assert bool(method) == bool(sum(float(x.rpartition(" ")[2]) for x in accepted))
    finally:
        stop(server)
    assert log.read_text().count("2 processes share this machine") == 2
    assert gone(server.process.pid)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_server_ends_with_one_of_its_engines(demo_path: Path, tmp_path: Path) -> None:
    server = start(demo_path, tmp_path / "log", "--data-parallel-size", "2")
    try:
        wait(server, PATIENCE)
        assert ask(server, "Flat is")
        engines = [one for one in group(server.process.pid) if "EngineCore" in one.name()]
        assert len(engines) == 2
        engines[1].send_signal(signal.SIGKILL)
        server.process.wait(60)
        assert gone(server.process.pid)
        assert "EngineCore_DP1" in server.log
    finally:
        stop(server)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_an_engine_without_a_front_end_joins_one(demo_path: Path, tmp_path: Path) -> None:
    """Two commands, as on two machines: a server without engines of its own, and an engine."""
    from support.server import free_port

    port = str(free_port())
    common = ("--data-parallel-size", "2", "--data-parallel-size-local", "1")
    common += ("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", port)
    first = start(demo_path, tmp_path / "first", *common, "--api-server-count", "1")
    second = start(
        demo_path, tmp_path / "second", *common, "--headless", "--data-parallel-start-rank", "1"
    )
    try:
        wait(first, PATIENCE)
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda _: ask(first, "Flat is better than"), range(8)))
        assert len(set(texts)) == 1
        lines = str(first.request("/metrics")).splitlines()
        served = {x for x in lines if x.startswith("vllm:request_success_total{")}
        for engine in (0, 1):
            counts = [x for x in served if f'engine="{engine}"' in x]
            assert sum(float(x.rpartition(" ")[2]) for x in counts) > 0
    finally:
        stop(second)
        stop(first)
    assert gone(first.process.pid)
    assert gone(second.process.pid)
