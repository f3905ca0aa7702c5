"""What the expert cache counts is in vLLM's metrics, in its log and in the status."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

import vllm_moe_compat
from support.engine import Greedy, in_process_llm
from support.server import Server, serve
from vllm_moe_compat.backend.vllm.expert_cache_stats import METRICS
from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.expert_cache.counters import Counters, counters, counters_of

pytestmark = pytest.mark.serve
PROMPTS = [[5, 7, 9, 11, 3, 8], [15, 17, 9]]


@contextmanager
def llm(path: Path, **settings: Any) -> Iterator[Any]:
    with in_process_llm(path, disable_log_stats=False, max_model_len=128, **settings) as found:
        yield found


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Our log lines; vLLM's logger, the parent of ours in its process, does not propagate."""
    ours = logging.getLogger("vllm_moe_compat")
    ours.addHandler(caplog.handler)
    caplog.handler.setLevel(logging.INFO)
    yield caplog
    ours.removeHandler(caplog.handler)


def sample(name: str) -> float:
    """The value of one of our counters in this process, over all models."""
    found = prometheus_client.REGISTRY.collect()
    full = f"vllm_moe_compat:expert_cache_{name}_total"
    return sum(s.value for metric in found for s in metric.samples if s.name == full)


def generate(llm: Any, count: int) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]


def test_metrics_log_and_status_have_the_counts(
    demo_path: Path, greedy: Greedy, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    monkeypatch.setenv(EXPERT_CACHE.name, "50%")
    # Those of an engine before, in the same process, are not this one's.
    counters_of("model.layers.0.mlp.switch_mlp").hits += 1000
    start, shown = counters(), {name: sample(name) for name in METRICS}
    with llm(demo_path, max_num_seqs=2) as served:
        assert generate(served, 8) == [greedy.tokens(prompt, 8) for prompt in PROMPTS]
        counted = counters() - start
        assert counted.misses > 0
        assert counted.hits > 0
        for name in METRICS:
            assert sample(name) - shown[name] == pytest.approx(getattr(counted, name))
        served.llm_engine.logger_manager.log()
    (line,) = {m for m in said.messages if "expert cache: " in m}
    assert f"{100 * counted.hits / _uses(counted):.1f}% of {_uses(counted):,} uses" in line
    (report,) = {m for m in said.messages if "; keeps 4 of 8 experts in each of 4 layers" in m}
    assert "2.2 MiB of 4.5 MiB, 50%; the least is 1.1 MiB" in report
    # 2 sequences with 2 experts each never need more than 4.
    assert not [m for m in said.messages if "sequences at once may need" in m]
    found = vllm_moe_compat.status().expert_cache
    assert found == counters()
    assert "expert cache: " in str(vllm_moe_compat.status())


def _uses(counts: Counters) -> int:
    return counts.hits + counts.misses


def test_more_sequences_than_slots_are_warned_of(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    monkeypatch.setenv(EXPERT_CACHE.name, "50%")
    with llm(demo_path, max_num_seqs=3):
        pass
    (line,) = {m for m in said.messages if "sequences at once may need" in m}
    assert (
        "3 sequences at once may need 6 experts of a layer, and VLLM_MOE_COMPAT_EXPERT_CACHE=50% "
        "holds 4: every pass may then read up to 16 experts in 4 layers ("
    ) in line
    assert "--max-num-seqs 2 needs no more" in line


def test_without_a_cache_nothing_is_added(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXPERT_CACHE.name, raising=False)
    before = {name: sample(name) for name in METRICS}
    with llm(demo_path) as served:
        generate(served, 2)
        kinds = {type(found).__name__ for found in served.llm_engine.logger_manager.stat_loggers}
        assert served.llm_engine.vllm_config.additional_config == {}
    assert kinds == {"PerEngineStatLoggerAdapter", "PrometheusStatLogger"}
    assert {name: sample(name) for name in METRICS} == before


@pytest.mark.full
def test_a_server_shows_them(demo_path: Path, tmp_path: Path) -> None:
    env = {EXPERT_CACHE.name: "50%", "VLLM_LOG_STATS_INTERVAL": "1"}
    with serve(demo_path, tmp_path / "log", "--max-num-seqs", "4", env=env) as server:
        first = _shown(server)
        assert first["misses"] == 0  # They are there before the first request.
        body = {"model": "demo", "prompt": [5, 7, 9, 11, 3, 8], "max_tokens": 24, "temperature": 0}
        server.request("/v1/completions", body | {"ignore_eos": True})
        second = _shown(server)
        assert all(second[name] > first[name] for name in METRICS)
        server.request("/v1/completions", body | {"ignore_eos": True})
        assert _shown(server)["hits"] > second["hits"]
    assert re.search(r"moe_compat: expert cache: \d+\.\d% of \d+ uses in memory", server.log)
    assert "sequences at once may need" in server.log


def _shown(server: Server) -> dict[str, float]:
    return {name: server.metric(f"vllm_moe_compat:expert_cache_{name}_total") for name in METRICS}
