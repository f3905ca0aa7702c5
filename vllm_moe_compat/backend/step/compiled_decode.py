"""Decode passes as compiled graphs: the model's Python runs once per shape, not once per pass.

``mx.compile`` keeps the graph of a function and fuses its elementwise operations. A decode pass
is a function of its tokens, positions, page indices, pools and states, so all of these are inputs
and outputs; the weights are constants. A pass with another number of rows or pages is another
function, which takes milliseconds to trace. The first trace of a model also compiles fused
kernels: on the CPU with g++, half a second each, kept in the temporary folder. Short runs
therefore never compile: a shape is compiled after ``PASSES_BEFORE_COMPILING`` decode passes, when
it comes for the second time in a row.

A trace is wrong if the model's Python depends on something that changes and is no input. Hence
three guards. Caches show the model only what is an input here; whatever else it asks for raises.
A trace that leaves arrays in the model is undone. And the first two passes of a kind are computed
in both ways on the live request and must agree bit for bit. If anything fails, decode passes stay
as they were, and the log says why.

Only passes whose attention is computed on the pool are compiled: the other methods have a new
shape with every token. So this is for float32 on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vllm_moe_compat.backend.model import kernels
from vllm_moe_compat.backend.pages import decode_attention
from vllm_moe_compat.backend.pages.attention_metadata import AttentionMetadata, Tiles
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.backend.pages.state_pool import State
from vllm_moe_compat.backend.step.graph import Graph, GraphBuilder
from vllm_moe_compat.log import logger

PASSES_BEFORE_COMPILING = 256
# Functions kept; in a ragged batch the number of pages changes every few tokens.
MOST_FUNCTIONS = 32
# A trace costs as much as a few compiled passes save. A kind whose number of pages changes too
# often for that, as with many rows on small pages, is no longer traced after its first traces.
USES_PER_TRACE, FREE_TRACES = 6, 4
# Passes of a kind that are also computed without compilation.
TRIALS = 2


Metadata = Sequence[AttentionMetadata | None]
"""Metadata of every cache of the model; None for states."""


class CannotCompileError(Exception):
    """The model's Python cannot run once for many passes."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The arrays of one metadata: offset, rows by ``counts``, tiles by ``heads``."""

    block: int
    counts: tuple[int, ...]
    heads: tuple[int, ...]
    ragged: bool


@dataclass(frozen=True, slots=True)
class _Kind:
    """What two passes have in common that differ in their number of pages only.

    Attributes:
        rows: B.
        parts: of the distinct metadata.
        owner: index into ``parts`` of each softmax layer.
    """

    rows: int
    parts: tuple[_Part, ...]
    owner: tuple[int, ...]


class _Inputs:
    """The arrays of a pass's metadata in one list, and the key of its compiled function."""

    def __init__(self, layers: Sequence[AttentionLayer], metadata: Metadata) -> None:
        distinct: list[AttentionMetadata] = []
        users: list[list[AttentionLayer]] = []
        owner = []
        for layer in layers:
            own = metadata[layer.index]
            assert own is not None
            index = next((i for i, one in enumerate(distinct) if one is own), len(distinct))
            if index == len(distinct):
                distinct.append(own)
                users.append([])
            users[index].append(layer)
            owner.append(index)
        self.arrays: list[mx.array] = []
        parts = []
        for own, used_by in zip(distinct, users, strict=True):
            counts = tuple(sorted({layer.planes * layer.kv_heads for layer in used_by}))
            heads = tuple(sorted({layer.kv_heads for layer in used_by}))
            self.arrays.append(own.offset)
            self.arrays += [own.rows(count) for count in counts]
            tiles = [own.tiles(count) for count in heads]
            ragged = tiles[0].by_row is not None
            for one in tiles:
                self.arrays += [one.queries, one.keys, one.values, one.own, one.bias]
                if one.by_row is not None and one.row_bias is not None:
                    self.arrays += [one.by_row, one.row_bias]
            parts.append(_Part(own.block, counts, heads, ragged))
        rows = len(distinct[0].offsets) if distinct else 0
        self.kind = _Kind(rows, tuple(parts), tuple(owner))
        self.key = self.kind, tuple(tuple(array.shape) for array in self.arrays)


class TracedMetadata:
    """The members of ``AttentionMetadata`` that attention on the pool uses, as inputs of a trace.

    Anything else would be a constant of the trace, so it does not exist here.
    """

    width, from_start, tokens, verifies, by_token = 1, False, None, False, None

    def __init__(self, part: _Part, arrays: Iterator[mx.array]) -> None:
        self.block, self.offset = part.block, next(arrays)
        self._rows = {count: next(arrays) for count in part.counts}
        self._tiles = {heads: _tiles(arrays, part.ragged) for heads in part.heads}

    def rows(self, count: int) -> mx.array:
        """As in ``AttentionMetadata``."""
        return self._rows[count]

    def tiles(self, heads: int) -> Tiles:
        """As in ``AttentionMetadata``."""
        return self._tiles[heads]


def _tiles(arrays: Iterator[mx.array], ragged: bool) -> Tiles:
    queries, keys, values, own, bias = (next(arrays) for _ in range(5))
    by_row, row_bias = (next(arrays), next(arrays)) if ragged else (None, None)
    return Tiles(queries, keys, values, own, bias, by_row, row_bias)


class CompiledDecode:
    """The compiled decode passes of one model.

    Attributes:
        failure: why nothing is compiled; empty while it is possible.
        passes: passes whose graph came from a compiled function.
        traces: functions traced, by kind.
    """

    def __init__(self, builder: GraphBuilder, *, enabled: bool) -> None:
        self._builder, storage = builder, builder.storage
        self._layers = [x for x in storage.layers if isinstance(x, AttentionLayer)]
        self._caches = len(storage.layers)
        self._pools = storage.distinct_pools
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._agreed: dict[_Kind, int] = {}
        self._seen = 0
        self._last: Any = None
        self.passes = 0
        self.traces, self._uses = Counter[_Kind](), Counter[_Kind]()
        self.failure = self._obstacle() if enabled else "switched off"

    def _obstacle(self) -> str:
        if not self._layers:
            return "the model has no softmax layer"
        if any(layer.single_sequence for layer in self._layers):
            return "the model's code takes one sequence at a time"
        if not all(
            layer.attends_itself and decode_attention.computes_on_pool(layer.dtype)
            for layer in self._layers
        ):
            return "attention is not computed on the pool"
        return ""

    def inputs(self, metadata: Metadata) -> _Inputs | None:
        """Return the inputs of a decode pass if it is to be compiled, else None."""
        self._seen += 1
        if self.failure or self._seen <= PASSES_BEFORE_COMPILING:
            return None
        found = _Inputs(self._layers, metadata)
        again, self._last = found.key == self._last, found.key
        wanted = found.key in self._functions or (again and self._pays(found.kind))
        return found if wanted else None

    def _pays(self, kind: _Kind) -> bool:
        """Return whether another trace of ``kind`` is likely to be used often enough."""
        traces = self.traces[kind]
        return traces < FREE_TRACES or self._uses[kind] >= USES_PER_TRACE * traces

    def on_trial(self, inputs: _Inputs) -> bool:
        """Whether the pass has to be computed without compilation too."""
        return self._agreed.get(inputs.kind, 0) < TRIALS

    def build(self, inputs: _Inputs, tokens: mx.array, states: list[State]) -> Graph:
        """Build a pass on the current pools, which are left as they are.

        Raises:
            CannotCompileError: the model cannot be traced; nothing has changed.
        """
        function = self._functions.get(inputs.key)
        known = function is not None
        if not known:
            self._prepare_to_trace()
        function = function or mx.compile(self._pass_of(inputs.kind))
        before = [] if known else _members(self._builder.model)
        pages = [pool.pages for pool in self._pools]
        try:
            logits, after, new_states, hidden = function(tokens, pages, states, inputs.arrays)
            graph = Graph(logits, after, new_states, hidden=hidden[0] if hidden else None)
        except Exception as error:
            raise CannotCompileError(f"{type(error).__name__}: {error}") from error
        finally:
            for pool, current in zip(self._pools, pages, strict=True):
                pool.pages = current
            changed = _restore(before)
        if changed:
            raise CannotCompileError(f"a pass changes {', '.join(changed)}")
        self._uses[inputs.kind] += 1
        if not known:
            self.traces[inputs.kind] += 1
            self._functions[inputs.key] = function
            if len(self._functions) > MOST_FUNCTIONS:
                del self._functions[next(iter(self._functions))]
        self.passes += 1
        return graph

    def _prepare_to_trace(self) -> None:
        """Check that kernels can be written: MLX's own error would come while pools change.

        Raises:
            CannotCompileError: they cannot.
        """
        if not kernels.are_compiled():
            return
        try:
            kernels.check_folder()
        except OSError as error:
            raise CannotCompileError(f"{kernels.kernel_folder()}: {error.strerror}") from error
        if not self.traces:
            logger.info(
                "decode passes are compiled from now on; the first time on a machine, this step "
                "takes some seconds longer"
            )

    def _pass_of(self, kind: _Kind) -> Callable[..., Any]:
        """Return the function of tokens, pools, states and metadata that computes a pass."""
        lengths = np.ones(kind.rows, dtype=np.int64)

        def decode(
            tokens: mx.array, pages: list[mx.array], states: list[State], arrays: list[mx.array]
        ) -> tuple[mx.array, list[mx.array], list[State], list[mx.array]]:
            for pool, current in zip(self._pools, pages, strict=True):
                pool.pages = current
            rest = iter(arrays)
            parts = [TracedMetadata(part, rest) for part in kind.parts]
            metadata: list[Any] = [None] * self._caches
            for layer, owner in zip(self._layers, kind.owner, strict=True):
                metadata[layer.index] = parts[owner]
            graph = self._builder.build(tokens, metadata, states, lengths)
            hidden = [] if graph.hidden is None else [graph.hidden]
            return graph.logits, graph.pages, graph.states, hidden

        return decode

    def compare(self, inputs: _Inputs, plain: Graph, compiled: Graph) -> None:
        """Take note of a trial, both graphs of which are evaluated."""
        pairs = [(plain.logits, compiled.logits)]
        for one, other in zip(plain.states, compiled.states, strict=True):
            pairs += zip(one, other, strict=True)
        if all(_same_bits(one, other) for one, other in pairs):
            self._agreed[inputs.kind] = self._agreed.get(inputs.kind, 0) + 1
        else:
            self.give_up("the compiled pass has other logits")

    def close(self) -> None:
        """Let go of the weights, which compiled functions hold as constants."""
        self.failure = self.failure or "closed"
        self._functions.clear()

    def give_up(self, reason: object) -> None:
        """Compile nothing any more."""
        self.failure = str(reason)
        self._functions.clear()
        logger.info("decode passes are not compiled: %s", reason)


def _same_bits(one: mx.array, other: mx.array) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(mx.array_equal(one.view(mx.uint8), other.view(mx.uint8)).item())


Members = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]


def _members(model: nn.Module) -> Members:
    """Return each module with copies of its two dicts: arrays and modules, and anything else."""
    return [(module, dict(module), dict(vars(module))) for module in model.modules()]


def _restore(before: Members) -> list[str]:
    """Undo changes of members; return their names."""
    changed = []
    for module, items, attributes in before:
        for now, then in ((module, items), (vars(module), attributes)):
            if now.keys() != then.keys() or any(now[name] is not then[name] for name in then):
                names = [n for n in now.keys() | then.keys() if now.get(n) is not then.get(n)]
                changed += [f"{type(module).__name__}.{name}" for name in sorted(names)]
                # A module is a dict with an ``update`` of its own.
                dict.clear(now)
                dict.update(now, then)
    return changed
