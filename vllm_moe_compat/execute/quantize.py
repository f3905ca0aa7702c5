"""Weights go straight from the checkpoint's form to MLX's packed ones, tensor by tensor.

mlx-lm's ``sanitize`` renames tensors and reshapes some, and only the names that come
out of it say which module a tensor is for. So ``sanitize`` runs first, over
*stand-ins*: arrays of the right shape and of no size, one for each tensor that the plan
makes, beside the tensors that are still unread. A stand-in that comes out as it went in
is known by identity, and the name that it came out under is the tensor's module.
Then each tensor is read, dequantised and packed, a few experts at a time. The few that
``sanitize`` computes with (latent attention's ``kv_b_proj``) do not come out as they
went in; they are made before, and ``sanitize`` runs once more.

Which module is packed how, ``choices`` says. The result is bit for bit what mlx-lm's
``quantize_model`` would make of the dequantised model, without ever holding that.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.execute import run_plan as ex
from vllm_moe_compat.execute.build_tensor import make, make_build
from vllm_moe_compat.execute.quantization_policy import Choices, choose
from vllm_moe_compat.execute.stack import Arrays
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.packing import Requantize
from vllm_moe_compat.plan.planner import Plan
from vllm_moe_compat.plan.quantization import is_listed

Weights = MutableMapping[str, mx.array]
Executor: TypeAlias = Callable[..., tuple[dict[str, mx.array], Choices]]
"""The signature of ``execute``."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to do to one checkpoint's tensors.

    Attributes:
        plan: how its tensors are made, combined FP8 experts split.
        tensors: their descriptions, FP8 by its name.
        setting: the format wanted; None for floats.
        spare: modules, by the checkpoint's names, that are to stay as they are.
        float_dtype: of tensors that are dequantised and not packed.
        packed_dtype: of the values that are packed, and so of their scales.
    """

    plan: Plan
    tensors: Mapping[str, TensorInfo]
    setting: Requantize | None
    spare: Collection[str]
    float_dtype: str
    packed_dtype: str


@dataclass(frozen=True, slots=True)
class Piece:
    """What is made at once: a build's targets, or one tensor that is only packed.

    Attributes:
        build: how; the first of its weights says where a packed tensor comes from.
        names: what ``sanitize`` calls the targets.
        formats: how each is packed; None for not at all.
        dtype: of what is dequantised; empty where nothing is.
    """

    build: Build
    names: tuple[str, ...]
    formats: tuple[Requantize | None, ...]
    dtype: str = ""


@dataclass(slots=True)
class Pending:
    """Tensors that ``sanitize`` has named and nobody has read yet.

    Attributes:
        job: what they are made by.
        pieces: what is to be made.
        rest: what ``sanitize`` gave back ready, unread too.
        choices: what is packed how.
        sources: what pieces with operations are made of.
        waiting: what the others pack, by name.
    """

    job: Job
    pieces: list[Piece]
    rest: dict[str, mx.array]
    choices: Choices
    sources: dict[str, mx.array]
    waiting: dict[str, mx.array]

    def make(self, piece: Piece) -> dict[str, mx.array]:
        """Read a piece's sources, which are gone then, and return its tensors, evaluated.

        Raises:
            CheckpointFileError: it could not be made; nothing is held any more.
            InsufficientMemoryError: likewise, for want of memory.
        """
        try:
            if piece.names[0] in self.waiting:
                operand = Arrays([self.waiting.pop(piece.names[0])])
                return make((), operand, piece.names, "", piece.formats)
            return make_build(
                piece.build, self.sources, piece.dtype, names=piece.names, formats=piece.formats
            )
        except (RuntimeError, ValueError, MemoryError) as error:
            self.clear()
            files = {name: info.file for name, info in self.job.tensors.items()}
            raise ex.failure(piece.build, error.with_traceback(None), files) from error

    def clear(self) -> None:
        """Let go of everything."""
        for held in (self.rest, self.sources, self.waiting):
            held.clear()


def prepare(
    job: Job,
    weights: Weights,
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    model: Any,
) -> Pending:
    """Sanitize, and say what has to be made, reading only what ``sanitize`` computes with.

    Args:
        job: what to do.
        weights: the loader's dict; emptied.
        sanitize: upstream's, of ``model``.
        model: the instance.
    """
    real: tuple[Build, ...] = ()
    # Twice at most: what sanitize computes with is no stand-in the second time.
    for _ in range(2):
        show = _show(job, weights, real)
        sanitized = dict(sanitize(show.given))
        places = {
            show.stand_ins[id(a)]: n
            for n, a in sanitized.items()
            if id(a) in show.stand_ins and not _computed(a)
        }
        lost = [b for b in job.plan.builds if b not in real and not _all_out(b, places)]
        if not lost:
            break
        real += tuple(lost)
    came_from = {n: show.origin[id(a)] for n, a in sanitized.items() if id(a) in show.origin}
    sources = show.sources
    weights.clear()
    del show

    choices = Choices()
    if job.setting is not None:
        choices = choose(model, job.setting, _spared(job, came_from))
    pieces: list[Piece] = []
    for build in (b for b in job.plan.builds if b not in real):
        names = tuple(places[build, index] for index in range(len(build.targets)))
        formats = tuple(choices.formats.get(_module(name)) for name in names)
        dtype = job.packed_dtype if any(formats) else job.float_dtype
        pieces.append(Piece(build, names, formats, dtype))
    for name in places.values():
        del sanitized[name]
    waiting: dict[str, mx.array] = {}
    for name in list(sanitized):
        packing = choices.formats.get(_module(name))
        if packing is not None and name.endswith(".weight"):
            waiting[name] = sanitized.pop(name)
            build = Build(name, (came_from.get(name, name),), (), (packing,))
            pieces.append(Piece(build, (name,), (packing,)))
    return Pending(job, pieces, sanitized, choices, sources, waiting)


def execute(
    job: Job,
    weights: Weights,
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    model: Any,
    done: Callable[[int], object] = lambda count: None,
) -> tuple[dict[str, mx.array], Choices]:
    """Sanitize, then make and pack every tensor.

    Args:
        job: what to do.
        weights: the loader's dict; emptied.
        sanitize: upstream's, of ``model``.
        model: the instance.
        done: told how many of the checkpoint's tensors each step took.

    Returns:
        What ``sanitize`` would have returned, packed, and what was packed how.

    Raises:
        CheckpointFileError: a tensor could not be made; ``weights`` is empty then.
        InsufficientMemoryError: likewise, for want of memory.
    """
    pending = prepare(job, weights, sanitize, model)
    result: dict[str, mx.array] = {}
    try:
        for piece in pending.pieces:
            result |= pending.make(piece)
            mx.clear_cache()
            done(len(piece.build.sources))
    except CompatError:
        result.clear()
        raise
    finally:
        mx.clear_cache()
    done(len(pending.rest))
    return result | pending.rest, pending.choices


def _module(name: str) -> str:
    return name.removesuffix(".weight")


@dataclass(slots=True)
class _Show:
    """What ``sanitize`` is shown, and how to know its parts again: by identity.

    Attributes:
        given: its argument.
        stand_ins: id of a stand-in → its build and which of the build's targets it is.
        origin: id of any array → the name that it was given under.
        sources: what the builds with stand-ins are made of.
        keep: the arrays themselves: an id is theirs only while they live.
    """

    given: dict[str, mx.array]
    stand_ins: dict[int, tuple[Build, int]]
    origin: dict[int, str]
    sources: dict[str, mx.array]
    keep: list[mx.array]


def _show(job: Job, weights: Mapping[str, mx.array], real: Collection[Build]) -> _Show:
    """Put stand-ins for all that the plan makes, and the tensors themselves for ``real``."""
    # Handles of their own: `param *= x` in a sanitize changes the very array that it is given.
    given = {name: array.astype(array.dtype) for name, array in weights.items()}
    ex.widen_and_drop(job.plan, given, job.float_dtype)
    stand_ins: dict[int, tuple[Build, int]] = {}
    sources: dict[str, mx.array] = {}
    for build in job.plan.builds:
        if build in real:
            given |= make_build(build, given, job.packed_dtype)
            continue
        for name in build.sources:
            sources[name] = given.pop(name)
        for index, spec in enumerate(build.results(job.tensors, "BF16")):
            # Of one number that is there: an operation on it would show.
            stand_in = mx.broadcast_to(mx.array(0, dtype=mx.bfloat16), spec.shape)
            mx.eval(stand_in)
            given[build.targets[index]] = stand_in
            stand_ins[id(stand_in)] = build, index
    origin = {id(array): name for name, array in given.items()}
    return _Show(given, stand_ins, origin, sources, list(given.values()))


def _computed(array: mx.array) -> bool:
    """Whether something is still to be done to an array that was evaluated once."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return "label" in graph.getvalue()


def _all_out(build: Build, places: Mapping[tuple[Build, int], str]) -> bool:
    return all((build, index) in places for index in range(len(build.targets)))


def _spared(job: Job, came_from: Mapping[str, str]) -> Callable[[str], bool]:
    """Return whether a module's tensor, or one that it is made of, is of a spared module."""
    if not job.spare:
        return lambda path: False
    made_of = {target: build.weights for build in job.plan.builds for target in build.targets}

    def listed(path: str) -> bool:
        name = came_from.get(f"{path}.weight", "")
        return any(is_listed(_module(n), job.spare) for n in (name, *made_of.get(name, ())[:1]))

    return listed
