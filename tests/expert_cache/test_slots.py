"""Slots are allocated once and written in place."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from support.memory_experts import cached, container
from vllm_moe_compat.expert_cache import counters
from vllm_moe_compat.expert_cache.current_pass import current_pass

EXPERTS = 16


def addresses(layers: Any) -> dict[str, int]:
    """Address of each slot array's memory."""
    found = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        array = layers[name]["weight"]
        mx.eval(array)
        found[name] = np.array(array, copy=False).__array_interface__["data"][0]
    return found


@pytest.mark.parametrize("in_place", [True, False])
def test_no_slot_array_is_ever_copied(in_place: bool) -> None:
    resident = container("glu", EXPERTS)
    wide = SwitchLinear(512, 256, EXPERTS, bias=False)  # 0.5 MiB per expert.
    resident.gate_proj, resident.up_proj = wide, SwitchLinear(512, 256, EXPERTS, bias=False)
    resident.down_proj = SwitchLinear(256, 512, EXPERTS, bias=False)
    mx.eval(resident.parameters())
    experts, source = cached(resident, 8, in_place=in_place)
    inner = experts._call.__self__  # type: ignore[attr-defined]
    before = addresses(inner)
    mx.clear_cache()
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    x = mx.random.normal((1, 1, 512))
    for first in range(EXPERTS - 3):
        indices = mx.arange(first, first + 3, dtype=mx.uint32).reshape(1, 1, 3)
        with current_pass(1, 1, [1]):
            out = experts(x, indices)
            mx.eval(out)
        assert mx.array_equal(out, resident(x, indices))
        del out
    assert addresses(inner) == before
    # An array of slots is 4 MiB; staging holds the experts of one call twice.
    assert mx.get_peak_memory() - active < (2**18 if in_place else 2 * 3 * source.nbytes)


def test_staged_parts_are_written_like_whole_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_moe_compat.expert_cache import slots

    resident = container("nvfp4, global scale", EXPERTS)
    experts, source = cached(resident, 8, in_place=False)
    monkeypatch.setattr(slots, "_STAGED", 2 * source.nbytes)
    x, indices = mx.random.normal((5, 64)), mx.arange(10, dtype=mx.uint32).reshape(5, 2)
    assert mx.array_equal(experts(x, indices), resident(x, indices))
    assert max(map(len, source.asked)) == 2


def test_counters_count_uses_misses_and_bytes() -> None:
    resident = container("glu", EXPERTS)
    experts, source = cached(resident, 4, layer="counted")
    before = counters.counters()
    x = mx.random.normal((2, 64))

    def run(choice: list[list[int]]) -> None:
        mx.eval(experts(x, mx.array(choice, dtype=mx.uint32)))

    run([[0, 1], [1, 2]])  # 3 missing
    run([[0, 1], [2, 3]])  # 1 missing
    run([[3, 2], [3, 1]])  # none
    source.broken = {9}
    with current_pass(2, 1, [1, 1]):
        run([[3, 2], [9, 1]])  # 1 missing, and not read
    found = counters.layers()["counted"]
    assert (found.hits, found.misses, found.failures) == (3 + 3 + 3, 5, 1)
    assert found.bytes_read == 4 * source.nbytes
    assert (found.passes, found.groups) == (4, 4)
    assert found.seconds_waited > 0
    since = counters.counters() - before
    assert (since.hits, since.misses) == (found.hits, found.misses)
    run([[4, 5], [6, 7]])
    # A snapshot stays what it was.
    assert found.misses == 5
