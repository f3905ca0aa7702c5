"""A real ``vllm serve`` with drafts: the same answers, and vLLM's own metrics of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.engine import Greedy
from support.processes import gone
from support.server import Server, serve

pytestmark = [pytest.mark.serve, pytest.mark.full]

DRAFTS = {
    "ngram": {"prompt_lookup_min": 2, "prompt_lookup_max": 3, "num_speculative_tokens": 3},
    "mtp": {"num_speculative_tokens": 2},
}
METRIC = "vllm:spec_decode_num"


@pytest.fixture(scope="module", params=DRAFTS)
def server(
    request: pytest.FixtureRequest, demo_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "server.log"
    settings = {"method": request.param} | DRAFTS[request.param]
    arguments = ("--speculative-config", json.dumps(settings), "--enable-sleep-mode")
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_MOE_COMPAT_PARK_DRAFTS": "0"}
    with serve(demo_path, log, *arguments, "--max-num-batched-tokens", "48", env=env) as server:
        yield server
    assert "worker shut down" in server.log
    engine = [line for line in server.log.splitlines() if "EngineCore pid" in line]
    assert not [line for line in engine if "Traceback" in line or "ERROR" in line]
    assert gone(server.process.pid), "no process of the server may outlive it"


def counts(server: Server) -> list[float]:
    names = ("_drafts_total", "_draft_tokens_total", "_accepted_tokens_total")
    return [server.metric(METRIC + name) for name in names]


def ask(server: Server, prompt: Any, **body: Any) -> Any:
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 48} | body
    return server.request("/v1/completions", body)["choices"][0]


def test_golden_text_and_the_metrics_of_its_drafts(server: Server, demo_path: Path) -> None:
    golden = json.loads((demo_path / "golden.json").read_text())
    before = counts(server)
    answer = ask(server, golden["prompt"], max_tokens=golden["max_tokens"])
    assert answer["text"] == golden["text"]
    drafts, tokens, accepted = (
        after - some for after, some in zip(counts(server), before, strict=True)
    )
    assert 0 < drafts <= tokens
    assert 0 < accepted <= tokens
    # Each step with a draft gives one token more than it accepts.
    assert accepted + drafts <= golden["max_tokens"]
    assert counts(server)[2] == server.metric(METRIC + "_accepted_tokens_per_pos_total")


def test_requests_at_once_and_prompts_in_chunks(server: Server, greedy: Greedy) -> None:
    prompts = [[20 + i % 90 for i in range(n)] for n in (5, 130, 61, 90, 3, 33, 140, 17)]

    def tokens(prompt: list[int]) -> list[int]:
        answer = ask(server, prompt, ignore_eos=True, return_token_ids=True)
        return list(answer["token_ids"])

    for _ in range(2):  # the second time from cached prefixes
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(tokens, prompts))
        assert found == [greedy.tokens(prompt, 48) for prompt in prompts]


def test_parameters_that_vllm_refuses_beside_drafts_have_their_effect(server: Server) -> None:
    chosen = ask(server, "Beautiful is", logit_bias={"77": 100.0}, max_tokens=4, logprobs=0)
    assert len(set(chosen["logprobs"]["tokens"])) == 1
    certain = [ask(server, "Special cases", temperature=1.9, min_p=1.0) for _ in range(2)]
    assert {one["text"] for one in certain} == {ask(server, "Special cases")["text"]}


def test_a_stream_has_the_same_text(server: Server) -> None:
    body = {"model": "demo", "prompt": "Special cases", "temperature": 0, "max_tokens": 40}
    pieces = [chunk["choices"][0]["text"] for chunk in server.stream("/v1/completions", body)]
    assert "".join(pieces) == ask(server, "Special cases", max_tokens=40)["text"]


@pytest.mark.parametrize("level", [1, 2])
def test_drafts_go_on_after_sleep(server: Server, level: int) -> None:
    awake = ask(server, "Beautiful is better than")["text"]
    server.request(f"/sleep?level={level}", {})
    server.request("/wake_up", {})
    before = counts(server)
    assert ask(server, "Beautiful is better than")["text"] == awake
    assert all(after > some for after, some in zip(counts(server), before, strict=True))


def test_the_log_says_how_steps_are_scheduled(server: Server) -> None:
    assert server.log.count("sync scheduling is off") + server.log.count(
        "Async scheduling not supported with ngram"
    )
    assert "won't work with speculative decoding" not in server.log
