"""Weights go straight from the checkpoint's form to MLX's packed ones, tensor by tensor.

mlx-lm's ``sanitize`` renames tensors and reshapes some, and only the names that come
out of it say which module a tensor is for. So ``sanitize`` runs first, over
*stand-ins*: arrays of the right shape that are never evaluated, one for each tensor
that the plan makes, beside the tensors that are still unread. A stand-in that comes
out is known by identity, and the name that it came out under is the tensor's module.
Then each tensor is read, dequantised and packed, a few experts at a time.

Which module is packed how is mlx-lm's own decision, as in ``mlx_lm.utils.
quantize_model``: modules that have a packed form and whole groups, as the class's
``quant_predicate`` says. The result is bit for bit what that function would make of
the dequantised model; without ever holding the dequantised model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from vllm_moe_compat import execute as ex
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.layout import TensorInfo, fold
from vllm_moe_compat.plan import Build, DequantizeBlockFp8, Plan, Requantize, SplitGateUp

Weights = MutableMapping[str, mx.array]


@dataclass(slots=True)
class Choices:
    """Which modules are packed, and how.

    Attributes:
        formats: module path → its format.
        overrides: those whose format is not the setting's own.
        odd: modules that stay as they are because a row is no whole number of groups.
        spared: modules that stay as they are because the checkpoint lists them.
    """

    formats: dict[str, Requantize] = field(default_factory=dict)
    overrides: dict[str, Requantize] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)


def choose(model: Any, setting: Requantize, listed: Callable[[str], bool]) -> Choices:
    """Decide for every module of the model.

    Args:
        model: the instance, its weights still unread.
        setting: the format wanted.
        listed: whether the checkpoint asks for a module, by its path, to be spared.
    """
    choices = Choices()
    predicate = getattr(model, "quant_predicate", None)
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        shape = tuple(module.weight.shape)
        verdict = True if predicate is None else predicate(path, module)
        chosen = setting
        if isinstance(verdict, Mapping):
            chosen = Requantize(
                verdict.get("bits", setting.bits),
                verdict.get("group_size", setting.group),
                verdict.get("mode", "affine"),
            )
        if not verdict:
            continue
        if listed(path):
            choices.spared.append(path)
        elif not (setting.fits(shape) and chosen.fits(shape)):
            choices.odd.append(path)
        else:
            choices.formats[path] = chosen
            if chosen != setting:
                choices.overrides[path] = chosen
    return choices


@dataclass(frozen=True, slots=True)
class Job:
    """What to do to one checkpoint's tensors.

    Attributes:
        plan: how its tensors are made, combined FP8 experts split.
        tensors: their descriptions, FP8 by its name.
        setting: the format wanted.
        spare: modules, by the checkpoint's names, that are to stay as they are.
        float_dtype: of tensors that are dequantised and not packed.
        packed_dtype: of the values that are packed, and so of their scales.
    """

    plan: Plan
    tensors: Mapping[str, TensorInfo]
    setting: Requantize
    spare: Collection[str]
    float_dtype: str
    packed_dtype: str


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
        UnsupportedCheckpointError: ``sanitize`` computes with tensors that have to
            be made first; nothing was read.
        CheckpointFileError: a tensor could not be made; ``weights`` is empty then.
        InsufficientMemoryError: likewise, for want of memory.
    """
    given: dict[str, mx.array] = dict(weights)
    ex.prepare(job.plan, given, job.float_dtype)
    stand_ins: dict[int, tuple[Build, int]] = {}
    keep: list[mx.array] = []
    sources: dict[str, mx.array] = {}
    origin: dict[int, str] = {}
    for build in job.plan.builds:
        for name in (*build.weights, *build.scales):
            sources[name] = given.pop(name)
        for index, spec in enumerate(build.results(job.tensors, "BF16")):
            stand_in = mx.zeros(spec.shape, dtype=mx.bfloat16)
            given[build.targets[index]] = stand_in
            stand_ins[id(stand_in)] = build, index
            keep.append(stand_in)
    origin = {id(array): name for name, array in given.items()}
    # Ids are compared below, so nothing may be freed, and its id reused, before that.
    keep.extend(given.values())
    sanitized = dict(sanitize(given))

    places = {stand_ins[id(a)]: n for n, a in sanitized.items() if id(a) in stand_ins}
    _all_came_out(job.plan, places)
    came_from = {n: origin[id(a)] for n, a in sanitized.items() if id(a) in origin}
    weights.clear()
    given.clear()
    keep.clear()
    origin.clear()
    stand_ins.clear()

    listed = _spared(job, came_from)
    choices = choose(model, job.setting, listed)
    for name in places.values():
        del sanitized[name]
    result: dict[str, mx.array] = {}
    try:
        for build in job.plan.builds:
            names = [places[build, index] for index in range(len(build.targets))]
            formats = [choices.formats.get(_module(name)) for name in names]
            current = build
            result |= _make(job, build, ex.take(build, sources), names, formats)
            mx.clear_cache()
            done(len(build.weights) + len(build.scales))
        for name in list(sanitized):
            array = sanitized.pop(name)
            packing = choices.formats.get(_module(name))
            if packing is None or not name.endswith(".weight"):
                result[name] = array
            else:
                current = Build(name, (came_from.get(name, name),), (), (packing,))
                result |= _pack(ex.floats(array, None, (1, 1), ""), [name], array.shape, [packing])
                del array
                mx.clear_cache()
            done(1)
    except (RuntimeError, ValueError, MemoryError) as error:
        for held in (result, sanitized, sources):
            held.clear()
        files = {name: info.file for name, info in job.tensors.items()}
        raise ex.failure(current, error.with_traceback(None), files) from error
    finally:
        mx.clear_cache()
    return result, choices


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _all_came_out(plan: Plan, places: Mapping[tuple[Build, int], str]) -> None:
    lost = [
        target
        for build in plan.builds
        for index, target in enumerate(build.targets)
        if (build, index) not in places
    ]
    if lost:
        raise UnsupportedCheckpointError(
            f"{fold(lost)} cannot be quantised while loading, since the sanitize of {plan.module} "
            "computes with it, where a renaming was expected; load without "
            "VLLM_MOE_COMPAT_QUANTIZE, or quantise with `mlx_lm.convert -q`."
        )


def _spared(job: Job, came_from: Mapping[str, str]) -> Callable[[str], bool]:
    """Return whether a module's tensor, or one that it is made of, is of a spared module."""
    if not job.spare:
        return lambda path: False
    made_of = {target: build.weights for build in job.plan.builds for target in build.targets}

    def listed(path: str) -> bool:
        name = came_from.get(f"{path}.weight", "")
        return any(is_listed(_module(n), job.spare) for n in (name, *made_of.get(name, ())[:1]))

    return listed


def is_listed(module: str, entries: Collection[str]) -> bool:
    """Whether an entry of ``modules_to_not_convert`` names the module, its parent or its end."""
    return any(
        module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
        for entry in entries
    )


def _make(
    job: Job,
    build: Build,
    operand: ex.Arrays,
    names: list[str],
    formats: list[Requantize | None],
) -> dict[str, mx.array]:
    """Carry out one build, the last step of which is to pack."""
    block, halves = (1, 1), False
    for op in build.ops:
        match op:
            case DequantizeBlockFp8(size):
                block = size
            case SplitGateUp():
                halves = True
            case _:
                operand = ex.run(op, operand, job.packed_dtype)
    (weight,) = operand.weights
    scale = operand.scales[0] if operand.scales else None
    operand.weights.clear()
    shape = (*weight.shape[:-2], weight.shape[-2] // (2 if halves else 1), weight.shape[-1])
    dtype = job.packed_dtype if any(formats) else job.float_dtype
    return _pack(ex.floats(weight, scale, block, dtype), names, shape, formats)


def _pack(
    parts: Any, names: list[str], shape: tuple[int, ...], formats: list[Requantize | None]
) -> dict[str, mx.array]:
    """Write parts of ``[…, k·O, I]`` into the buffers of ``k`` packed targets ``[…, O, I]``."""
    targets = [_Target(shape, packing) for packing in formats]
    rows = shape[-2]
    for experts, band, part in parts:
        for number, target in enumerate(targets):
            low, high = max(band.start, number * rows), min(band.stop, (number + 1) * rows)
            if low < high:
                piece = part[:, low - band.start : high - band.start]
                target.put(experts, slice(low - number * rows, high - number * rows), piece)
                del piece
        del part
        mx.eval([target.buffers for target in targets])
    return {
        f"{_module(name)}.{kind}": array
        for name, target in zip(names, targets, strict=True)
        for kind, array in target.arrays().items()
    }


class _Target:
    """The buffers of one target ``[…, O, I]``, filled a piece at a time."""

    def __init__(self, shape: tuple[int, ...], packing: Requantize | None) -> None:
        self._shape, self._packing = shape, packing
        self.buffers: list[mx.array] = []

    def put(self, experts: slice, rows: slice, piece: mx.array) -> None:
        """Pack ``[n, o, I]`` into its place; not evaluated."""
        found = [piece]
        if self._packing is not None:
            bits, group, mode = self._packing.bits, self._packing.group, self._packing.mode
            found = list(mx.quantize(piece, group, bits, mode=mode))
        *lead, height, _ = self._shape
        if not self.buffers:
            self.buffers = [
                mx.zeros((math.prod(lead), height, part.shape[-1]), dtype=part.dtype)
                for part in found
            ]
            mx.eval(self.buffers)
        for buffer, part in zip(self.buffers, found, strict=True):
            buffer[experts, rows] = part

    def arrays(self) -> dict[str, mx.array]:
        """Return the finished parameters by their name in the module."""
        lead = self._shape[:-1]
        kinds = ("weight", "scales", "biases")
        return {
            kind: buffer.reshape(*lead, buffer.shape[-1])
            for kind, buffer in zip(kinds, self.buffers, strict=False)
        }


def held(weights: Mapping[str, mx.array], choices: Choices) -> dict[str, int]:
    """Return the bytes held in each format, the largest share first."""
    count: Counter[str] = Counter()
    for name, array in weights.items():
        path = name.rpartition(".")[0]
        packing = choices.formats.get(path)
        form = str(packing) if packing else str(array.dtype).rpartition(".")[2]
        count[form] += array.nbytes
    return dict(count.most_common())


def saved(weights: Mapping[str, mx.array], choices: Choices) -> int:
    """Return how many bytes fewer the packed modules take than their values would."""
    bytes_saved = 0
    for path, packing in choices.formats.items():
        parts = [weights.get(f"{path}.{kind}") for kind in ("weight", "scales", "biases")]
        if parts[0] is not None and parts[1] is not None:
            item = parts[1].dtype.size if packing.mode == "affine" else 2
            values = parts[0].size * 32 // packing.bits * item
            bytes_saved += values - sum(part.nbytes for part in parts if part is not None)
    return bytes_saved
