"""Pools are zeros whose memory comes when it is used."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection

import mlx.core as mx
import psutil
import pytest

from vllm_moe_compat.backend.pages import untouched
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.load import claims

MIB = 1 << 20
SIZE = 64 * MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is touched on Metal")


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def figures() -> dict[str, int | bool]:
    """Allocate a pool and use some of it; what that took."""
    mx.eval(mx.ones(1))
    mx.clear_cache()
    before, claimed = resident(), claims.own()
    pool = PagePool(SIZE // MIB, MIB, mx.float32)
    pool.allocate()
    found: dict[str, int | bool] = {"allocated": resident() - before}
    found["claimed"] = claims.own() - claimed
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    rows = mx.arange(8 * 1024, dtype=mx.uint32)
    pool.write_rows(rows, mx.full((8 * 1024, 256), 7, dtype=mx.uint32))
    mx.eval(pool.pages)
    found["peak"] = mx.get_peak_memory() - active - 8 * MIB
    found["used"] = resident() - before
    found["claimed_when_used"] = claims.own() - claimed
    # Of two, the first stays as it is.
    second = PagePool(SIZE // MIB, MIB, mx.float32)
    second.allocate()
    found["claimed_by_two"] = claims.own() - claimed
    del second
    found["zeros"] = not pool.pages[8:].any().item() and bool((pool.pages[:8] == 7).all().item())
    del pool
    found["claimed_at_the_end"] = claims.own() - claimed
    return found


def send_figures(end: Connection) -> None:
    end.send(figures())


def in_a_child() -> dict[str, int | bool]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    child = context.Process(target=send_figures, args=(theirs,))
    child.start()
    try:
        assert mine.poll(120)
        found: dict[str, int | bool] = mine.recv()
        return found
    finally:
        child.join(60)


@pytest.mark.parametrize("where", [figures, in_a_child])
def test_a_pool_takes_memory_as_it_is_used(where) -> None:
    """In this process and in one that vLLM makes for an engine, which go different ways."""
    found = where()
    assert found["allocated"] < 8 * MIB
    assert found["zeros"]
    # Reading all of it for the check above touched it; before, eight pages were.
    assert 8 * MIB <= found["used"] < 32 * MIB
    assert found["peak"] < 4 * MIB, "the write copied the pool"
    assert found["claimed"] > SIZE - 8 * MIB
    assert SIZE - 12 * MIB <= found["claimed_when_used"] <= SIZE - 7 * MIB
    assert abs(found["claimed_by_two"] - found["claimed_when_used"] - SIZE) < MIB
    assert found["claimed_at_the_end"] == 0


def test_memory_that_was_in_use_reads_as_zeros() -> None:
    """Below the size from which the allocator asks for fresh memory, too."""
    for size in (1000, 3 * 4096, 5 * MIB + 12):
        used = mx.full((size // 4,), 0xFFFFFFFF, dtype=mx.uint32)
        mx.eval(used)
        del used
        array = untouched.zeros((size // 4,), mx.uint32)
        assert not array.any().item()
        dirty = mx.full((size // 4,), 0xFFFFFFFF, dtype=mx.uint32)
        mx.eval(dirty)
        untouched._give_back(memoryview(dirty))
        assert not dirty.any().item()


def test_allocating_again_does_not_claim_twice() -> None:
    before = claims.own()
    pool = PagePool(SIZE // MIB, MIB, mx.float32)
    pool.allocate()
    pool.allocate()
    assert claims.own() - before <= SIZE
