"""States of fixed size: resident arrays for running requests, pages for states read later.

A state is as large as the keys and values of hundreds of tokens, and every decode step changes
all of it. So the states of the running batch stay in arrays ``[B, …]`` per layer, which are
passed from step to step unchanged and regrouped once when the batch changes. Pages are written
only for states that vLLM may come back to: at a block boundary (prefix caching), and after a
chunk of a prompt.

The state after ``n`` tokens is in the page of block ``(n - 1) // block``. A request without
computed tokens starts from zero and reads no page, so it never sees the state of the block's
previous owner. The same addressing serves both of vLLM's modes: with prefix caching off,
``block`` is the longest sequence, and the page is always the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_moe_compat.backend.pages.layers import StateLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.pages.states_by_position import StatesByPosition

State = tuple[mx.array, ...]
"""State of one layer, rows first: for gated-delta a convolution tail and ``[B, Hv, Dv, Dk]``."""


@dataclass
class _Bank:
    """States of requests computed together: row ``i`` of every array is that of ``req_ids[i]``."""

    req_ids: list[str]
    states: list[State]

    def rows(self, index: Sequence[int]) -> list[State]:
        """Return the states of the rows ``index`` for all layers, not evaluated."""
        if list(index) == list(range(len(self.req_ids))):
            return self.states
        taken = mx.array(np.asarray(index, dtype=np.uint32))
        return [tuple(part[taken] for part in state) for state in self.states]


class StatePool:
    """States of all layers that have one, by request."""

    def __init__(
        self, layers: Sequence[StateLayer], pools: Sequence[PagePool], groups: Sequence[int]
    ) -> None:
        """``pools`` and ``groups``: page pool and KV group of each layer, in the same order."""
        self.layers, self.pools, self.groups = list(layers), list(pools), list(groups)
        self.banks: list[_Bank] = []

    @staticmethod
    def bytes_per_sequence(layers: Sequence[StateLayer]) -> int:
        """Return the bytes of one sequence's states in all layers."""
        return sum(sum(_sizes(layer)) for layer in layers)

    @property
    def resident(self) -> set[str]:
        """Ids of requests whose states are in resident arrays."""
        return {req_id for bank in self.banks for req_id in bank.req_ids}

    def resident_states(self, req_ids: Sequence[str]) -> list[State]:
        """Return the states of a batch resident in exactly this order, else an empty list."""
        order = list(req_ids)
        return next((bank.states for bank in self.banks if bank.req_ids == order), [])

    def drop(self, req_ids: set[str]) -> None:
        """Discard the rows of requests that ended or lost their pages."""
        banks = []
        for bank in self.banks:
            keep = [i for i, req_id in enumerate(bank.req_ids) if req_id not in req_ids]
            if len(keep) < len(bank.req_ids):
                bank = _Bank([bank.req_ids[i] for i in keep], bank.rows(keep))
                mx.eval(bank.states)
            if keep:
                banks.append(bank)
        self.banks = banks

    def take_out(
        self, req_ids: Sequence[str], computed: Sequence[int], blocks: Mapping[int, Sequence[int]]
    ) -> list[State]:
        """Remove and return the states of ``req_ids``, in their order, per layer.

        A request without a resident row gets zeros if ``computed[i]`` is 0, and otherwise the
        state saved in the page ``blocks[group][i]``. Rows of other requests stay.
        """
        for number, bank in enumerate(self.banks):
            if bank.req_ids == list(req_ids):
                # The common case: the batch is unchanged. The bank is removed, so that the
                # arrays have one owner and the layers can reuse their buffers.
                return self.banks.pop(number).states
        missing = {req_id: i for i, req_id in enumerate(req_ids)}
        parts: list[list[State]] = []
        order: list[int] = []
        for bank in self.banks:
            index = [i for i, req_id in enumerate(bank.req_ids) if req_id in missing]
            if index:
                parts.append(bank.rows(index))
                order += [missing.pop(bank.req_ids[i]) for i in index]
        paged = [i for i in missing.values() if computed[i] > 0]
        if paged:
            parts.append(
                [
                    self._read(number, [blocks[group][i] for i in paged])
                    for number, group in enumerate(self.groups)
                ]
            )
        fresh = [i for i in missing.values() if computed[i] == 0]
        if fresh:
            parts.append([_zeros(layer, len(fresh)) for layer in self.layers])
        back = mx.array(np.argsort(np.asarray(order + paged + fresh)).astype(np.uint32))
        states: list[State] = [
            tuple(
                mx.concatenate([part[number][array] for part in parts])[back]
                for array in range(len(layer.shapes))
            )
            for number, layer in enumerate(self.layers)
        ]
        # Evaluate the reads of pages before anything writes to them (see ``page_pool``).
        mx.eval(states)
        self.drop(set(req_ids))
        return states

    def put_in(self, req_ids: Sequence[str], states: list[State]) -> None:
        """Keep the states of ``req_ids``, per layer, for the next step; the pass evaluates them."""
        self.banks.append(_Bank(list(req_ids), states))

    def put_positions(
        self,
        req_ids: Sequence[str],
        by_position: Sequence[StatesByPosition],
        counts: Sequence[int],
    ) -> None:
        """Keep the states of a pass after ``counts[i]`` tokens of its row ``i``, ``req_ids[i]``.

        Args:
            req_ids: the rows of the pass; none has a resident state.
            by_position: states after every token of the pass, per layer; evaluated.
            counts: 1 to the number of tokens of the pass.
        """
        states = [layer.after(range(len(req_ids)), counts) for layer in by_position]
        # Now, so that the states after other tokens are freed.
        mx.eval(states)
        self.put_in(req_ids, states)

    def save(self, req_ids: Sequence[str], blocks: Mapping[int, Sequence[int]]) -> None:
        """Write the states to the pages ``blocks[group][i]``; they also stay resident."""
        place = {req_id: i for i, req_id in enumerate(req_ids)}
        for bank in self.banks:
            index = [i for i, req_id in enumerate(bank.req_ids) if req_id in place]
            if not index:
                continue
            at = [place[bank.req_ids[i]] for i in index]
            for number, state in enumerate(bank.rows(index)):
                self._write(number, state, [blocks[self.groups[number]][i] for i in at])

    def save_positions(
        self,
        by_position: Sequence[StatesByPosition],
        rows: Sequence[int],
        counts: Sequence[int],
        blocks: Mapping[int, Sequence[int]],
    ) -> None:
        """Write states from inside a pass to pages: block boundaries that a row went over.

        Args:
            by_position: states after every token of the pass, per layer; evaluated.
            rows: of the pass; a row that went over several boundaries occurs several times.
            counts: tokens of the row ``rows[i]`` after which the state is written, from 1 on.
            blocks: the pages ``blocks[group][i]``.
        """
        if not rows:
            return
        for number, layer in enumerate(by_position):
            self._write(number, layer.after(rows, counts), blocks[self.groups[number]])

    def _write(self, number: int, state: State, page: Sequence[int]) -> None:
        """Write a state of layer ``number``, with one row per page."""
        pool = self.pools[number]
        values = mx.concatenate(
            [part.view(pool.raw).reshape(len(page), -1) for part in state], axis=1
        )
        pool.write_head(mx.array(np.asarray(page, dtype=np.uint32)), values)
        mx.eval(pool.pages)

    def _read(self, number: int, page: Sequence[int]) -> State:
        layer, pool = self.layers[number], self.pools[number]
        sizes = [size // pool.raw.size for size in _sizes(layer)]
        index = mx.array(np.asarray(page, dtype=np.uint32))
        raw = mx.split(pool.read_head(index, sum(sizes)), np.cumsum(sizes)[:-1].tolist(), axis=1)
        return tuple(
            mx.contiguous(part).view(dtype).reshape(len(page), *shape)
            for part, shape, dtype in zip(raw, layer.shapes, layer.dtypes, strict=True)
        )


def _sizes(layer: StateLayer) -> list[int]:
    """Return the bytes of each array of the state of one sequence."""
    parts = zip(layer.shapes, layer.dtypes, strict=True)
    return [int(np.prod(shape)) * int(dtype.size) for shape, dtype in parts]


def _zeros(layer: StateLayer, count: int) -> State:
    return tuple(
        mx.zeros((count, *shape), dtype=dtype)
        for shape, dtype in zip(layer.shapes, layer.dtypes, strict=True)
    )
