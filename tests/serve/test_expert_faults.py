"""A file that is broken while a server reads experts from it ends the requests that need them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from serve.test_odd_requests import assert_quiet, play
from support import expert_files, odd_requests
from support.engine import Greedy, in_process_llm, worker
from support.server import serve
from vllm_moe_compat.expert_cache.install import containers

pytestmark = pytest.mark.serve

TOKENS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"async_scheduling": True},
    "chunks": {"async_scheduling": True, "max_num_batched_tokens": 24},
}


@pytest.fixture(scope="module")
def checkpoint(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return expert_files.write(tmp_path_factory.mktemp("experts") / "model", demo_path)


class Routing(Greedy):
    """mlx-lm's tokens, and the experts that they need in the layer whose files are broken."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        mlp = self.model.layers[expert_files.LAYER].mlp
        container = mlp.switch_mlp
        self.chosen: list[mx.array] = []

        def noting(x: mx.array, indices: mx.array) -> mx.array:
            self.chosen.append(indices)
            return container(x, indices)

        mlp.switch_mlp = noting
        self._needed: dict[tuple[int, ...], set[int]] = {}

    def needed(self, prompt: list[int]) -> set[int]:
        if tuple(prompt) not in self._needed:
            self.chosen.clear()
            known = prompt + self.tokens(prompt, TOKENS)
            self.chosen.clear()
            self.model(mx.array([known[:-1]]))
            (chosen,) = self.chosen
            self._needed[tuple(prompt)] = {int(e) for e in np.array(chosen).reshape(-1)}
        return self._needed[tuple(prompt)]


@pytest.fixture(scope="module")
def routing(checkpoint: Path) -> Routing:
    return Routing(checkpoint)


def prompts() -> dict[str, list[int]]:
    """Short prompts, and long ones of which one starts behind another."""
    draw = np.random.default_rng(5)
    found = {f"short {n}": draw.integers(5, 290, 1 + n % 2).tolist() for n in range(10)}
    long: list[int] = draw.integers(5, 290, 70).tolist()
    return found | {"long": long, "behind it": [*long, 7], "another": long[:40] + [9] * 20}


def send(llm: Any) -> dict[str, Any]:
    params = odd_requests.with_params(temperature=0, max_tokens=TOKENS)
    return play(llm, {name: (prompt, params) for name, prompt in prompts().items()}, [0, 0, 1])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "async" else pytest.mark.full) for name in SETTINGS],
)
def test_only_requests_that_need_the_expert_end(
    name: str,
    checkpoint: Path,
    routing: Routing,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = expert_files.FAULTS if request.config.getoption("--full") else expert_files.FAULTS[::2]
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "12.5%")
    settings = {"enable_prefix_caching": True, "block_size": 16, "max_model_len": 128}
    with in_process_llm(checkpoint, **(settings | SETTINGS[name])) as llm:
        cached = {one.layer: one for one in containers(worker(llm).served.model)}
        layer = cached[expert_files.CONTAINER]
        assert layer.slots == 2
        for fault in faults:
            assert llm.reset_prefix_cache()
            in_no_slot = set(np.flatnonzero(layer._policy.slot_of < 0).tolist())
            expert = min(in_no_slot & routing.needed(prompts()["long"]))
            file = checkpoint / expert_files.file_of(expert)
            with expert_files.broken(file, fault):
                found = send(llm)
            failed = check(found, routing, expert, file)
            assert {"long", "behind it"} <= failed < set(found), fault
            # Wrong pages are not found again, and the file is read again.
            found = send(llm)
            assert not check(found, routing, expert, file), fault
            assert_quiet(llm, set(found))


def check(found: dict[str, Any], routing: Routing, expert: int, file: Path) -> set[str]:
    """Check all answers; return the names of the requests that failed."""
    failed = set()
    for name, prompt in prompts().items():
        (answer,) = found[name].outputs
        if answer.finish_reason == "error":
            failed.add(name)
            assert expert in routing.needed(prompt), name
            assert f"expert {expert} of {expert_files.CONTAINER}" in answer.stop_reason
            assert file.name in answer.stop_reason
        else:
            assert list(answer.token_ids) == routing.tokens(prompt, TOKENS), name
    return failed


@pytest.mark.full
def test_a_server_answers_500_and_lives_on(
    checkpoint: Path, routing: Routing, tmp_path: Path
) -> None:
    cache = {"VLLM_MOE_COMPAT_EXPERT_CACHE": "12.5%"}
    long = prompts()["long"]
    body = {"model": "demo", "prompt": long, "temperature": 0, "max_tokens": TOKENS}
    with serve(checkpoint, tmp_path / "log", env=cache) as server:
        for fault in expert_files.FAULTS:
            ways: list[Callable[[], Any]] = [
                lambda: server.status("/v1/completions", body),
                lambda: list(server.stream("/v1/completions", body)),
            ]
            for way in ways:
                # One of three is in no slot, whatever the two of them hold.
                for expert in sorted(routing.needed(long))[:3]:
                    file = checkpoint / expert_files.file_of(expert)
                    before = len(server.log)
                    with expert_files.broken(file, fault):
                        answer = str(way())
                    if "error" in answer:
                        break
                assert "'code': 500" in answer
                reason = f"expert {expert} of {expert_files.CONTAINER}: {file.name}"
                assert reason in server.log[before:]
            status, answer = server.status("/v1/completions", body | {"return_token_ids": True})
            assert status == 200
            assert answer["choices"][0]["token_ids"] == routing.tokens(long, TOKENS)
