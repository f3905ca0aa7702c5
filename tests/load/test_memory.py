"""Limits of containers, and what is left to the machine."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

import vllm_moe_compat
from support.checkpoints import Fp8, Sizes, build
from support.loading import load
from vllm_moe_compat.errors import InsufficientMemoryError
from vllm_moe_compat.load import cgroups, memory
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.plan import estimate
from vllm_moe_compat.plan.estimate import Estimate

GIB = 1 << 30


def v2(folder: Path, limit: str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\n")


def v1(folder: Path, limit: int, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {inactive}\n")


def own(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "cgroup"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_the_least_limit_of_all_ancestors_counts(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    v2(root / "a", "4000", 3000, 500)
    v2(root / "a" / "b", "max", 100)
    v2(root / "a" / "b" / "c", "9000", 200)
    assert cgroups.limits(root, own(tmp_path, "0::/a/b/c")) == (4000, 1500)


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    v2(root, "5000", 1000)
    assert cgroups.limits(root, own(tmp_path, "0::/docker/outside")) == (5000, 4000)
    v1(root / "memory", 3000, 2500, 100)
    lines = ("5:cpu,cpuacct:/x", "4:memory:/docker/outside", "0::/")
    assert cgroups.limits(root, own(tmp_path, *lines)) == (3000, 600)


def test_without_a_limit_the_host_counts(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    v2(root, "max", 1000)
    assert cgroups.limits(root, own(tmp_path, "0::/")) is None
    assert cgroups.limits(root, tmp_path / "missing") is None


def test_a_limit_lowers_total_and_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "fs"
    v2(root, str(GIB), GIB // 4)
    file = own(tmp_path, "0::/")
    monkeypatch.setattr(cgroups.limits, "__defaults__", (root, file))
    monkeypatch.setattr(memory.claims, "outstanding", lambda: GIB // 4)
    assert memory.host_memory() == (GIB, GIB // 2)


def test_the_reserve_is_two_gib_or_a_tenth() -> None:
    assert memory.reserve(8 * GIB) == 2 * GIB
    assert memory.reserve(100 * GIB) == 10 * GIB


@pytest.mark.parametrize(
    ("free", "peak", "said"),
    [
        (16, 13, ""),
        (16, 15, "less than 2.4 GiB are left to the machine"),
        (16, 17, "expect swapping"),
        # A machine that is nearly full anyway: only a load that takes most of the rest counts.
        (1, 0.4, ""),
        (1, 0.6, "less than 512.0 MiB are left"),
    ],
)
def test_a_load_that_leaves_the_machine_too_little_warns(
    free: float,
    peak: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda: (24 * GIB, int(free * GIB)))
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    bytes_ = int(peak * GIB)
    needs = Estimate(read=0, final={"none": bytes_ // 2}, peak={"none": bytes_})
    with caplog.at_level(logging.WARNING, "vllm_moe_compat"):
        memory.check("model", needs, "none")
    assert (said in caplog.text) if said else not caplog.text


def test_weights_larger_than_the_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda: (4 * GIB, 3 * GIB))
    needs = Estimate(read=0, final={"none": 5 * GIB}, peak={"none": 6 * GIB})
    with pytest.raises(InsufficientMemoryError, match="more than the"):
        memory.check("model", needs, "none")


def test_processes_that_load_at_once_divide_the_machine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda: (24 * GIB, 16 * GIB))
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    needs = Estimate(read=0, final={"none": 7 * GIB}, peak={"none": 7 * GIB})
    with caplog.at_level(logging.WARNING, "vllm_moe_compat"):
        memory.check("model", needs, "none")
        assert not caplog.text
        memory.check("model", needs, "none", processes=2)
    assert "8.0 GiB of 12.0 GiB are free for each of 2 processes" in caplog.text
    with pytest.raises(InsufficientMemoryError, match="has for each of 4 processes"):
        memory.check("model", needs, "none", processes=4)


# --- with a cache of experts -------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda: (total, free))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 12 MiB of experts in bfloat16, and little else."""
    sizes = Sizes(hidden=256, intermediate=128, experts=32, layers=2)
    return build("per-expert", Fp8(), sizes=sizes).write(tmp_path_factory.mktemp("moe"))


@pytest.fixture
def moe(written: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
    monkeypatch.setattr(estimate, "WORKING_BYTES", 1 << 20)
    with vllm_moe_compat.applied():
        yield written
    mx.clear_cache()


def test_a_load_without_room_is_told_the_largest_cache_that_fits(
    moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 8 << 20, 1 << 30)
    with pytest.raises(InsufficientMemoryError) as error:
        load(moe)
    said = re.search(r"or VLLM_MOE_COMPAT_EXPERT_CACHE=(\d+MiB), which leaves", str(error.value))
    assert said is not None
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", said[1])
    load(moe)
    report = last_report()
    assert report is not None
    assert report.expert_cache is not None
    assert report.expert_cache.nbytes < 8 << 20


def test_a_load_that_leaves_too_little_is_told_of_a_cache(
    moe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    machine(monkeypatch, 1 << 30, 16 << 20)
    with caplog.at_level(logging.WARNING, "vllm_moe_compat"):
        load(moe)
    assert re.search(r"set .*VLLM_MOE_COMPAT_EXPERT_CACHE=\d+MiB, which leaves", caplog.text)
    caplog.clear()
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "25%")
    with caplog.at_level(logging.WARNING, "vllm_moe_compat"):
        load(moe)
    assert not caplog.text


# --- with several ranks ------------------------------------------------------


def test_a_rank_needs_its_share_and_no_cache_is_advised(
    moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 8 << 20, 1 << 30)
    with pytest.raises(InsufficientMemoryError, match="EXPERT_CACHE"):
        load(moe)
    for options in ({}, {"layers": lambda count: (0, count // 2)}):
        with loading_with(ranks=2, **options):
            load(moe)
            with pytest.raises(InsufficientMemoryError) as error, loading_with(processes=2):
                load(moe)
        assert "EXPERT_CACHE" not in str(error.value)
        assert "for each of 2 processes that load at once" in str(error.value)
