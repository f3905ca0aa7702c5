"""Sleep, wake-up, calls outside a step and shutdown of an engine whose experts are on disk."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
import pytest

from serve.test_sleep import ask, engine
from support import models
from support.engine import worker
from vllm_moe_compat.expert_cache.install import containers

pytestmark = pytest.mark.serve

CACHE = "VLLM_MOE_COMPAT_EXPERT_CACHE"


@pytest.fixture
def checkpoint(demo_path: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    return models.write(path, "qwen3_moe of 16 experts", demo_path, dtype="float32")


def held(path: Path) -> tuple[int, int, int]:
    """Bytes of arrays, open files of the checkpoint, and threads that read experts."""
    gc.collect()
    mx.clear_cache()
    process = psutil.Process()
    files = [file for file in process.open_files() if Path(file.path).parent == path]
    return int(mx.get_active_memory()), len(files), reading_threads()


def reading_threads() -> int:
    import threading

    return sum(thread.name.startswith("read-experts") for thread in threading.enumerate())


def test_it_sleeps_and_wakes_and_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(checkpoint) as llm:
        wanted = ask(llm)
        sums = worker(llm).compute_weight_checksums()
    before = held(checkpoint)
    monkeypatch.setenv(CACHE, "25%")
    with engine(checkpoint) as llm:
        assert ask(llm) == wanted
        awake = held(checkpoint)
        assert awake[1:] > (0, 0)
        slots = sum(one.nbytes for one in containers(worker(llm).served.model))
        assert worker(llm).compute_weight_checksums() == sums
        for level in (1, 2):
            kept: Any = worker(llm).served.model  # Somebody else holds the model.
            llm.sleep(level=level)
            asleep = held(checkpoint)
            assert asleep[0] - before[0] < slots // 8
            assert asleep[1:] == (0, 0)
            assert kept is not None
            llm.wake_up()
            assert ask(llm) == wanted
            assert sum(one.nbytes for one in containers(worker(llm).served.model)) == slots
            del kept
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        assert ask(llm) == wanted
        assert "CachedExperts" in llm.collective_rpc("get_model_inspection")[0]
    assert held(checkpoint)[1:] == (0, 0)
    assert held(checkpoint)[0] - before[0] < slots // 8


def test_another_model_is_not_taken(
    checkpoint: Path, tmp_path: Path, demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that differs in its experts alone."""
    import json

    from safetensors.torch import load_file, save_file

    monkeypatch.setenv(CACHE, "50%")
    other = tmp_path / "other"
    models.write(other, "qwen3_moe of 16 experts", demo_path, dtype="float32")
    (shard,) = other.glob("model*.safetensors")
    tensors = load_file(shard)
    for name in [name for name in tensors if ".experts." in name]:
        axis = 1 if "down_proj" in name else 0
        tensors[name] = tensors[name].narrow(axis, 0, 16).contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 16}))
    with engine(checkpoint) as llm:
        wanted = ask(llm)
        with pytest.raises(Exception, match=r"switch_mlp.*only weights can change"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert llm.reset_prefix_cache()
        assert ask(llm) == wanted
