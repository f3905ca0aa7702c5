"""Sleep gives memory back, wake-up gives exact answers, and what cannot be done pauses nothing."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from support import models
from support.engine import Greedy, engine_core, in_process_llm, worker

pytestmark = pytest.mark.serve

PROMPT = list(range(20, 190))
Answer = tuple[int, list[int], float]


def ask(llm: Any, count: int = 8) -> Answer:
    """Cached tokens, the answer, and its log-probability, which shows more than the answer."""
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, greedy_params(count), use_tqdm=False)
    answer = output.outputs[0]
    return output.num_cached_tokens or 0, list(answer.token_ids), answer.cumulative_logprob


def greedy_params(count: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=count, detokenize=False, ignore_eos=True, logprobs=0
    )


def engine(path: Path, **settings: Any) -> AbstractContextManager[Any]:
    defaults = {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "enable_sleep_mode": True,
        "async_scheduling": True,
    }
    return in_process_llm(path, **(defaults | settings))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return models.write_mlx(tmp_path / "model", "qwen3_moe")


@pytest.fixture(scope="module")
def elsewhere() -> int:
    """Bytes that tests of other files hold."""
    gc.collect()
    mx.clear_cache()
    return int(mx.get_active_memory())


@pytest.fixture(scope="module")
def _demo_llm(demo_path: Path, elsewhere: int) -> Iterator[Any]:
    with engine(demo_path, skip_tokenizer_init=False) as llm:
        yield llm


@pytest.fixture
def demo_llm(_demo_llm: Any) -> Iterator[Any]:
    """The demo: FP8 weights that are dequantised, and layers with states."""
    yield _demo_llm
    if _demo_llm.llm_engine.is_sleeping():  # A test failed: the next one would wait for ever.
        _demo_llm.wake_up()


@pytest.mark.parametrize("level", [1, 2])
def test_memory_is_given_back_and_answers_are_exact(
    demo_llm: Any, elsewhere: int, level: int
) -> None:
    llm = demo_llm
    llm.reset_prefix_cache()
    first, again = ask(llm), ask(llm)
    assert first[0] == 0 < again[0], "the prefix must be cached before"
    pages = sum(pool.nbytes for pool in worker(llm).runner.storage.distinct_pools)
    awake = mx.get_active_memory() - elsewhere
    assert awake > pages > 30 << 20
    llm.sleep(level)
    assert llm.llm_engine.is_sleeping()
    assert mx.get_active_memory() - elsewhere < 1 << 16, "weights, states and pages are gone"
    assert mx.get_cache_memory() < 1 << 16
    llm.wake_up()
    assert not llm.llm_engine.is_sleeping()
    assert abs(mx.get_active_memory() - elsewhere - awake) < 2 << 20, (
        "states of the last request at most"
    )
    # Nothing is served from the new pages before it is computed anew.
    assert [ask(llm), ask(llm)] == [first, again]


@pytest.mark.parametrize(
    "order",
    [("weights", "kv_cache"), pytest.param(("kv_cache", "weights"), marks=pytest.mark.full)],
)
@pytest.mark.parametrize("level", [1, 2])
def test_waking_in_two_parts(
    demo_llm: Any, elsewhere: int, level: int, order: tuple[str, str]
) -> None:
    llm = demo_llm
    before = ask(llm)[1:]
    pages = sum(pool.nbytes for pool in worker(llm).runner.storage.distinct_pools)
    llm.sleep(level)
    llm.wake_up([order[0]])
    held = mx.get_active_memory() - elsewhere
    assert llm.llm_engine.is_sleeping()
    assert held >= pages if order[0] == "kv_cache" else held < pages
    # At level 2 weights are read by the one that comes first: reload_weights, or a complete wake.
    assert (held > 1 << 16) == (order[0] == "kv_cache" or level == 1)
    if level == 2 and order[0] == "weights":
        llm.collective_rpc("reload_weights")
        assert mx.get_active_memory() - elsewhere > 1 << 16
    llm.wake_up([order[1]])
    assert not llm.llm_engine.is_sleeping()
    assert ask(llm)[1:] == before


def start(llm: Any, count: int, steps: int) -> None:
    llm.llm_engine.add_request("running", {"prompt_token_ids": PROMPT}, greedy_params(count))
    for _ in range(steps):
        llm.llm_engine.step()


def finish(llm: Any, steps: int = 200) -> list[Any]:
    outputs = []
    for _ in range(steps):
        outputs += llm.llm_engine.step()
        core = engine_core(llm)
        if not (core.scheduler.has_requests() or core.batch_queue):
            break
    return outputs


def test_a_kept_request_goes_on_as_if_nothing_had_been(demo_llm: Any, elsewhere: int) -> None:
    expected = ask(demo_llm, 24)[1]
    start(demo_llm, 24, steps=9)
    assert demo_llm.llm_engine.has_unfinished_requests()
    demo_llm.sleep(1, mode="keep")
    assert mx.get_active_memory() - elsewhere < 1 << 16
    demo_llm.wake_up()
    (last,) = [output for output in finish(demo_llm) if output.finished]
    assert list(last.outputs[0].token_ids) == expected
    assert worker(demo_llm).occupancy() == {"requests": 0, "states": 0}


def test_a_running_request_is_aborted_and_forgotten(demo_llm: Any) -> None:
    before = ask(demo_llm)[1:]
    start(demo_llm, 24, steps=5)
    demo_llm.sleep(1)
    demo_llm.llm_engine.abort_request(["running"])
    finish(demo_llm, 5)
    # One that comes and goes while nothing can run.
    demo_llm.llm_engine.add_request("waiting", {"prompt_token_ids": PROMPT}, greedy_params(4))
    finish(demo_llm, 5)
    demo_llm.llm_engine.abort_request(["waiting"])
    finish(demo_llm, 5)
    demo_llm.wake_up()
    assert ask(demo_llm)[1:] == before
    finish(demo_llm)
    assert worker(demo_llm).occupancy()["requests"] == 0


def test_a_sleeping_server_cannot_resume(demo_llm: Any) -> None:
    before = ask(demo_llm)[1:]
    core = engine_core(demo_llm)
    demo_llm.sleep(1)
    with pytest.raises(ValueError, match=r"kv_cache and weights given back.*wake it up first"):
        core.resume_scheduler()
    with pytest.raises(ValueError, match="weights sleep; wake the server up first"):
        demo_llm.apply_model(lambda model: None)
    demo_llm.sleep(2)  # vLLM: already sleeping
    demo_llm.wake_up()
    with pytest.raises(ValueError, match="only with vLLM's engine"):
        demo_llm.collective_rpc("sleep")
    assert ask(demo_llm)[1:] == before


def test_pages_alone(demo_llm: Any) -> None:
    if not hasattr(demo_llm, "release_kv_cache_memory"):  # new in later releases
        assert not hasattr(engine_core(demo_llm), "release_kv_cache_memory")
        return
    demo_llm.reset_prefix_cache()
    first, again = ask(demo_llm), ask(demo_llm)
    pages = sum(pool.nbytes for pool in worker(demo_llm).runner.storage.distinct_pools)
    with pytest.raises(RuntimeError, match="requires a completed pause"):
        demo_llm.release_kv_cache_memory()
    with pytest.raises(ValueError, match="only with vLLM's engine"):
        demo_llm.collective_rpc("discard", args=(("kv_cache",),))
    finish(demo_llm, 5)  # Tells the worker of the last end.
    awake = mx.get_active_memory()
    demo_llm.sleep(0)
    demo_llm.release_kv_cache_memory()
    assert mx.get_active_memory() < awake - pages + (1 << 16)
    demo_llm.wake_up(["kv_cache"])
    assert [ask(demo_llm), ask(demo_llm)] == [first, again]


def test_without_the_option_nothing_is_paused(checkpoint: Path) -> None:
    with engine(checkpoint, enable_sleep_mode=False) as llm:
        before = ask(llm)[1:]
        start(llm, 24, steps=4)
        for level in (1, 2):
            with pytest.raises(ValueError, match="started with --enable-sleep-mode"):
                llm.sleep(level)
        with pytest.raises(ValueError, match="no sleep level 3; use 0, 1 or 2"):
            llm.sleep(3)
        (running,) = [output for output in finish(llm) if output.finished]
        assert len(running.outputs[0].token_ids) == 24
        assert not llm.llm_engine.is_sleeping()
        assert ask(llm)[1:] == before
        llm.sleep(0)
        assert llm.llm_engine.is_sleeping()
        llm.wake_up(["scheduling"])
        assert ask(llm)[1:] == before


def scale_weights(folder: Path, by: float) -> None:
    """Write other weights of the same shapes into the same file."""
    file = str(folder / "model.safetensors")
    weights: Any = mx.load(file)
    scaled = {name: weight * by for name, weight in weights.items()}
    mx.eval(scaled)
    mx.save_safetensors(file, scaled, {"format": "mlx"})


def test_changed_files_are_noticed(checkpoint: Path) -> None:
    shard = checkpoint / "model.safetensors"
    with engine(checkpoint) as llm:
        before = ask(llm)[1:]
        status = shard.stat()
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
        with pytest.raises(ValueError, match=r"model\.safetensors: when it was loaded there was"):
            llm.sleep(1)
        assert not llm.llm_engine.is_sleeping()
        assert ask(llm)[1:] == before
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))

        llm.sleep(1)
        shard.rename(checkpoint / "elsewhere")
        with pytest.raises(ValueError, match="and now there is none; put the file back"):
            llm.wake_up()
        assert llm.llm_engine.is_sleeping()
        (checkpoint / "elsewhere").rename(shard)
        llm.wake_up()
        assert ask(llm)[1:] == before
        llm.sleep(1)  # A sleeping server can be shut down.


@pytest.mark.full
@pytest.mark.parametrize(
    "kind",
    [
        *("gpt_oss", "gemma4_text", "llama4", "deepseek_v3", "longcat_flash", "lfm2_moe", "jamba"),
        *("kimi_linear", "nemotron_h", "falcon_h1", "mimo_v2_flash"),
    ],
)
def test_every_kind_of_layer(kind: str, tmp_path: Path) -> None:
    path = models.write_mlx(tmp_path / "model", kind)
    others = mx.get_active_memory()  # Another engine of this file is awake.
    with engine(path, max_model_len=512) as llm:
        first, again = ask(llm), ask(llm)
        for level in (1, 2, 1):
            llm.sleep(level)
            assert mx.get_active_memory() - others < 1 << 16
            llm.wake_up()
            assert [ask(llm), ask(llm)] == [first, again]


@pytest.mark.parametrize("how", ["level 2", "level 1 and reload", "awake"])
def test_new_weights_in_the_same_files(checkpoint: Path, how: str) -> None:
    reload: Callable[[Any], Any] = lambda llm: llm.collective_rpc("reload_weights")  # noqa: E731
    with engine(checkpoint) as llm:
        before = ask(llm)[1]
        if how != "awake":
            llm.sleep(2 if how == "level 2" else 1)
        scale_weights(checkpoint, 1.25)
        expected = Greedy(checkpoint).tokens(PROMPT, 8)
        assert expected != before, "the new weights must answer otherwise"
        if how != "level 2":
            reload(llm)
        if how == "awake":
            # As vLLM says, cached prefixes are the caller's to reset.
            llm.reset_prefix_cache()
        llm.wake_up()
        assert ask(llm)[:2] == (0, expected)
        # The new files are those of the next sleep.
        llm.sleep(1)
        llm.wake_up()
        assert ask(llm)[1] == expected


def test_weights_that_do_not_load_leave_the_old_ones(checkpoint: Path, tmp_path: Path) -> None:
    other = models.write_mlx(tmp_path / "other", "mixtral")
    broken = models.write_mlx(tmp_path / "broken", "qwen3_moe")
    scale_weights(broken, 0.5)
    with engine(checkpoint) as llm:
        before = ask(llm)[1:]
        with pytest.raises(ValueError, match="only weights can change while a server runs"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        os.truncate(broken / "model.safetensors", 5000)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(broken)})
        assert ask(llm)[1:] == before
        llm.sleep(2)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(broken)})
        assert llm.llm_engine.is_sleeping()
        llm.wake_up()
        assert ask(llm)[1:] == before
