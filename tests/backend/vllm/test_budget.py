"""How memory is divided, with made-up machines; nothing is allocated."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from vllm_moe_compat import demo
from vllm_moe_compat.backend.vllm import bridge, budget, kv_specs
from vllm_moe_compat.backend.vllm.budget import Demands, divide
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.load.memory import device_memory

MIB, GIB = 1 << 20, 1 << 30
MANY = 1 << 50
DEMANDS = Demands(
    weights=GIB,
    activations=GIB,
    per_sequence=0,
    sequences=256,
    length=2048,
    cached=8,
    pages_for=lambda count: MANY,
    page_bytes=0,
    share=None,
)


def test_by_default_half_of_what_is_free_is_taken() -> None:
    found = divide(24 * GIB, 21 * GIB, DEMANDS)
    assert found.page_bytes == 10 * GIB
    assert found.spare == 10 * GIB
    assert "half of the memory free now; for more: --gpu-memory-utilization or" in found.reason


@pytest.mark.parametrize(("total", "kept"), [(24, 2.4), (8, 2), (400, 40)])
def test_by_default_the_machine_keeps_its_reserve(total: int, kept: float) -> None:
    free = int((kept + 1.5) * GIB)
    found = divide(total * GIB, free, DEMANDS)
    assert abs(found.spare - kept * GIB) <= 1
    assert found.page_bytes == free - GIB - found.spare
    assert "which the machine keeps; for more" in found.reason


def test_by_default_a_machine_without_more_than_its_reserve_is_refused() -> None:
    with pytest.raises(UnsupportedServingError, match=r"2048\.0 MiB are kept for the machine"):
        divide(8 * GIB, 3 * GIB, DEMANDS)
    found = divide(8 * GIB, 3 * GIB, replace(DEMANDS, page_bytes=64 * MIB))
    assert (found.page_bytes, found.spare) == (64 * MIB, 2 * GIB - 64 * MIB)


@pytest.mark.parametrize("given", [{}, {"share": 0.5}, {"page_bytes": GIB}], ids=str)
def test_engines_that_share_a_machine_take_no_more_together(given: dict[str, Any]) -> None:
    demands = replace(DEMANDS, **given)
    one, two = divide(24 * GIB, 20 * GIB, demands), divide(24 * GIB, 20 * GIB, demands, engines=2)
    assert 2 * (two.page_bytes + two.activations + two.spare) == 20 * GIB
    if "share" in given:  # of the machine, for both; the weights of both are in it
        assert 2 * (two.page_bytes + two.activations + two.weights) == 12 * GIB
    elif not given:
        assert two.page_bytes < one.page_bytes / 2
    assert two.reason.endswith("2 processes share this machine")


def test_no_more_is_taken_than_sequences_can_use() -> None:
    asked = []

    def pages_for(count: int) -> int:
        asked.append(count)
        return 3 * MIB

    found = divide(24 * GIB, 21 * GIB, replace(DEMANDS, pages_for=pages_for))
    assert found.page_bytes == 3 * MIB
    assert asked == [264]
    assert found.reason == "all that 256 sequences of 2048 tokens and 8 cached ones can use"


def test_an_explicit_share_means_what_it_says() -> None:
    found = divide(24 * GIB, 21 * GIB, replace(DEMANDS, share=0.75))
    assert found.page_bytes == 16 * GIB
    assert "limited by --gpu-memory-utilization" in found.reason
    # It cannot mean more than there is.
    found = divide(24 * GIB, 10 * GIB, replace(DEMANDS, share=0.92))
    assert (found.page_bytes, found.spare) == (9 * GIB, 0)
    assert "limited by the memory free now" in found.reason
    with pytest.raises(UnsupportedServingError, match=r"--gpu-memory-utilization 0.05 allows"):
        divide(24 * GIB, 21 * GIB, replace(DEMANDS, share=0.05))


def test_explicit_bytes_are_taken_and_override_the_share() -> None:
    found = divide(24 * GIB, 21 * GIB, replace(DEMANDS, page_bytes=19 * GIB, share=0.1))
    assert (found.page_bytes, found.spare) == (19 * GIB, GIB)
    with pytest.raises(UnsupportedServingError, match=r"--kv-cache-memory-bytes asks for 20480\.0"):
        divide(24 * GIB, 21 * GIB, replace(DEMANDS, page_bytes=20 * GIB))


@pytest.mark.parametrize("share", [None, 0.9])
def test_states_take_at_most_half(share: float | None) -> None:
    stateful = replace(DEMANDS, per_sequence=GIB, share=share)
    found = divide(24 * GIB, 21 * GIB, stateful)
    assert 1 <= found.sequences < 256
    assert found.states == found.sequences * GIB
    assert found.states <= (21 - 1) * GIB / 2
    assert found.activations + found.states + found.page_bytes + found.spare == 21 * GIB
    if share is None:
        assert found.page_bytes <= found.spare


# --- with a real engine -----------------------------------------------------------


@pytest.fixture(scope="module")
def mine(demo_checkpoint: demo.DemoCheckpoint) -> Any:
    from support.engine import in_process_llm, worker

    with in_process_llm(demo_checkpoint.path) as llm:
        yield worker(llm)


def test_what_starves_the_machine_warns(
    mine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Measured with the engine's own model, and not allocated."""
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    assert bridge.given_memory_share(mine.vllm_config) is None, "LLM() has a default of its own"
    total, free = device_memory()
    cache = mine.cache_config
    monkeypatch.setattr(cache, "kv_cache_memory_bytes", free - int(1.5 * GIB))
    budget.measure(mine.vllm_config, mine.served)
    assert "--kv-cache-memory-bytes" in caplog.text
    assert "when the pages fill" in caplog.text
    caplog.clear()
    monkeypatch.setattr(cache, "kv_cache_memory_bytes", None)
    monkeypatch.setattr(cache, "gpu_memory_utilization", 1.0)
    need = kv_specs.Demand(1 << 20, 1 << 20, 1024)
    with monkeypatch.context() as changed:
        changed.setattr(budget, "demand", lambda *_: need)
        found = budget.measure(mine.vllm_config, mine.served)
    assert "--gpu-memory-utilization 1.0 leaves" in caplog.text
    assert found.spare < budget.reserve(total)
    caplog.clear()
    monkeypatch.setattr(cache, "kv_cache_memory_bytes", 8 * MIB)
    held = mx.get_active_memory()
    gc.disable()
    budget.measure(mine.vllm_config, mine.served)
    assert mx.get_active_memory() == held, "nothing that was measured stays"
    gc.enable()
    assert not caplog.text


SHARES = {
    "engine default": ("EngineArgs", {}, None),
    "engine 0.92": ("EngineArgs", {"gpu_memory_utilization": 0.92}, 0.92),
    "engine 0.5": ("EngineArgs", {"gpu_memory_utilization": 0.5}, 0.5),
    "server default": ("serve", [], None),
    "server 0.92": ("serve", ["--gpu-memory-utilization", "0.92"], 0.92),
}


@pytest.mark.serve
@pytest.mark.parametrize("case", SHARES)
def test_a_given_share_is_told_from_the_default(
    case: str, demo_checkpoint: demo.DemoCheckpoint
) -> None:
    """Up to the process of the engine, to which vLLM's configuration is pickled."""
    import pickle

    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    kind, given, expected = SHARES[case]
    if kind == "serve":
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        parsed = parser.parse_args(["--model", str(demo_checkpoint.path), *given])
        args: Any = AsyncEngineArgs.from_cli_args(parsed)
    else:
        args = EngineArgs(model=str(demo_checkpoint.path), **given)
    config = args.create_engine_config()
    assert config.cache_config.gpu_memory_utilization == (expected or 0.92)
    there = pickle.loads(pickle.dumps(config))
    assert bridge.given_memory_share(there) == expected
