"""Pipeline parallelism: a rank keeps a range of a model's layers and gets the others' results.

The model's own code still runs from its first line to its last one on every rank, with all of its
masks and indices. Only its layers differ: a layer of another rank has no weights and returns what
it is given; the first layer of the range takes its input from the rank before, the last one gives
its output to the rank after, and what the last layer of the model gives is told to all ranks. So
every rank computes the output head and has the logits, and nothing of a family is written here.

That holds for layers that take an array and return one of the same shape, and for models with one
cache per layer. Others are refused.

Embedding, final norm and head are on every rank: layers may read the embedding, and the head may
be the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from vllm_moe_compat.errors import CompatError, UnsupportedServingError


class Transport(Protocol):
    """Moves the result of a layer ``[B, T, D]`` between neighbours."""

    def receive(self, like: mx.array) -> mx.array:
        """Return what the rank before gives, of the shape and dtype of ``like``."""

    def give(self, result: mx.array) -> mx.array:
        """Give ``result`` to the rank after; return it, to be evaluated."""

    def tell(self, result: mx.array) -> mx.array:
        """Return the ``result`` of the last rank, on all ranks."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The transport over MLX's group; the ranks' numbers are in the order of their layers."""

    group: mx.distributed.Group

    def receive(self, like: mx.array) -> mx.array:
        """Return what the rank before gives."""
        return mx.distributed.recv_like(like, self.group.rank() - 1, group=self.group)

    def give(self, result: mx.array) -> mx.array:
        """Give ``result`` to the rank after."""
        return mx.distributed.send(result, self.group.rank() + 1, group=self.group)

    def tell(self, result: mx.array) -> mx.array:
        """Return the ``result`` of the last rank."""
        return mx.distributed.all_gather(result, group=self.group)[-result.shape[0] :]


@dataclass(slots=True)
class Stage:
    """A rank's range of a model's layers.

    Attributes:
        begin: its first layer.
        end: the layer after its last one.
        count: layers of the model.
        transport: between the ranks.
        given: what the last pass gives to the rank after. It has to be evaluated with the pass,
            also where nothing else of the pass depends on it.
        dtypes: of what its first layer took and its last one gave in the last pass.
        twins: absent layer → a layer of the range with a cache of the same kind, if there is one.
        has_passed: whether the model's code has run on the range.
    """

    begin: int
    end: int
    count: int
    transport: Transport
    given: list[mx.array] = field(default_factory=list)
    dtypes: tuple[Any, Any] = (None, None)
    twins: dict[int, int] = field(default_factory=dict)
    has_passed: bool = False

    def caches(self, own: Sequence[Any]) -> list[Any]:
        """Return the list of caches that the model's code takes, from those of the range.

        Masks are made from caches at fixed places of the list, so an absent layer has that of a
        layer of its kind. Where the range has none, no layer uses the mask.
        """
        found: list[Any] = []
        for index in range(self.count):
            near = self.twins.get(index, index)
            here = self.begin <= near < self.end
            found.append(own[near - self.begin] if here else NoCache())
        return found


class NoCache:
    """In place of the cache of an absent layer whose mask no layer of the range uses."""

    offset = start_position = 0

    def __getitem__(self, _: int) -> NoCache:
        """Return one of several caches of a layer."""
        return self

    def maybe_trim_front(self) -> None:
        """Member of mlx-lm's chunked cache."""

    def make_mask(self, *_: Any, **__: Any) -> None:
        """Return no mask."""


class _StageModel:
    """What a model does in addition when it has a range of its layers."""

    moe_compat_stage: Stage

    def __call__(self, inputs: mx.array, cache: Any = None, **more: Any) -> Any:
        stage = self.moe_compat_stage
        stage.given = []
        if cache is not None:
            cache = stage.caches(cache)
        try:
            result = super().__call__(inputs, cache=cache, **more)  # type: ignore[misc]
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            if stage.has_passed or isinstance(error, CompatError):
                raise
            # An absent layer returns one array only, for which each code has words of its own.
            raise _refusal(type(self), f"its code fails on a range ({error})") from error
        stage.has_passed = True
        return result

    def make_cache(self) -> list[Any]:
        """Return the caches of the range."""
        stage = self.moe_compat_stage
        return _all_caches(super())[stage.begin : stage.end]


class _PresentLayer:
    """A layer of the range."""

    def __call__(self, result: Any, *more: Any, **named: Any) -> Any:
        stage, index = self.moe_compat_stage, self.moe_compat_index  # type: ignore[attr-defined]
        if not isinstance(result, mx.array):
            raise _refusal(type(self), "it takes more than one array of results")
        if index == stage.begin > 0:
            result = stage.transport.receive(result)
        shape = result.shape
        if index == stage.begin:
            stage.dtypes = (result.dtype, result.dtype)
        result = super().__call__(result, *more, **named)  # type: ignore[misc]
        if not isinstance(result, mx.array) or result.shape != shape:
            raise _refusal(type(self), "it returns something else than an array like its input")
        if index == stage.end - 1:
            stage.dtypes = (stage.dtypes[0], result.dtype)
        if index == stage.end - 1 < stage.count - 1:
            result = stage.transport.give(result)
            stage.given.append(result)
        return stage.transport.tell(result) if index == stage.count - 1 else result


class _AbsentLayer:
    """A layer of another rank: its attributes are there, and its weights are not."""

    def __call__(self, result: Any, *_: Any, **__: Any) -> Any:
        stage, index = self.moe_compat_stage, self.moe_compat_index  # type: ignore[attr-defined]
        return stage.transport.tell(result) if index == stage.count - 1 else result


def keep_range(model: Any, begin: int, end: int, transport: Transport) -> Stage:
    """Keep the layers ``begin`` to ``end`` of a model, in place; weights of the others are dropped.

    Args:
        model: an mlx-lm model, loaded lazily.
        begin: the first layer to keep.
        end: the layer after the last one to keep.
        transport: between the ranks, which have one range each.

    Raises:
        UnsupportedServingError: there is no layer in the range, or the model's caches are not one
            per layer.
    """
    layers = list(model.layers)
    if not 0 <= begin < end <= len(layers):
        raise UnsupportedServingError(
            f"{type(model).__module__} has {len(layers)} layers, and a rank of the pipeline would "
            f"have those from {begin} to {end}; every rank needs one: use a smaller "
            "pipeline_parallel_size."
        )
    made = _all_caches(model)
    if len(made) != len(layers) or len({id(layer) for layer in layers}) != len(layers):
        raise UnsupportedServingError(
            f"{type(model).__module__} cannot be divided into ranges of layers, since it has "
            f"{len(layers)} layers and {len(made)} caches; use pipeline_parallel_size 1."
        )
    stage = Stage(begin, end, len(layers), transport)
    kinds = [_kind(cache) for cache in made]
    own = {kind: index for index, kind in enumerate(kinds) if begin <= index < end}
    stage.twins = {
        index: own[kind]
        for index, kind in enumerate(kinds)
        if not begin <= index < end and kind in own
    }
    for index, layer in enumerate(layers):
        present = begin <= index < end
        if not present:
            layer.clear()
        _become(layer, _PresentLayer if present else _AbsentLayer)
        layer.moe_compat_stage, layer.moe_compat_index = stage, index
    _become(model, _StageModel)
    model.moe_compat_stage = stage
    return stage


def given(model: Any) -> list[mx.array]:
    """Return what the last pass of a model gives to the rank after; to be evaluated with it."""
    stage: Stage | None = getattr(model, "moe_compat_stage", None)
    return stage.given if stage is not None else []


def check_dtype(model: Any) -> None:
    """Check that ranks expect what they are given; after a pass that was built with final weights.

    A rank expects the dtype of the embedding.

    Raises:
        UnsupportedServingError: the layers change it.
    """
    stage: Stage | None = getattr(model, "moe_compat_stage", None)
    if stage is not None and stage.dtypes[0] != stage.dtypes[1]:
        taken, gave = stage.dtypes
        raise UnsupportedServingError(
            f"{type(model).__module__} cannot be divided into ranges of layers: they take {taken} "
            f"and return {gave}; use --dtype float32, or pipeline_parallel_size 1."
        )


def is_stage(model: Any) -> bool:
    """Whether a model has a range of its layers only."""
    return isinstance(model, _StageModel)


def _become(module: Any, ability: type) -> None:
    """Give a module a class of its own, which still is its class."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (ability, kind), {"__module__": kind.__module__})


def _all_caches(model: Any) -> list[Any]:
    from mlx_lm.models.cache import KVCache

    if hasattr(model, "make_cache"):
        return list(model.make_cache())
    return [KVCache() for _ in model.layers]


def _kind(cache: Any) -> tuple[Any, ...]:
    """Return what decides the mask that is made from a cache."""
    parts = getattr(cache, "caches", ())
    sizes = (getattr(cache, name, None) for name in ("max_size", "chunk_size"))
    return (type(cache), *sizes, *map(_kind, parts))


def _refusal(kind: type, reason: str) -> UnsupportedServingError:
    return UnsupportedServingError(
        f"{kind.__module__} cannot be divided into ranges of layers: {kind.__name__}: {reason}; "
        "use pipeline_parallel_size 1."
    )
