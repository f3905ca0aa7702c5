"""Weights go straight from the checkpoint's form to MLX's packed ones, tensor by tensor.

mlx-lm's ``sanitize`` renames tensors and reshapes some, and only the names that come
out of it say which module a tensor is for. So ``sanitize`` runs first, over
*stand-ins*: arrays of the right shape that are never evaluated, one for each tensor
that the plan makes, beside the tensors that are still unread. A stand-in that comes
out is known by identity, and the name that it came out under is the tensor's module.
Then each tensor is read, dequantised and packed, a few experts at a time. The few that
``sanitize`` computes with (latent attention's ``kv_b_proj``) do not come out as they
went in; they are made before, and ``sanitize`` runs once more.

Which module is packed how is mlx-lm's own decision, as in ``mlx_lm.utils.
quantize_model``: modules that have a packed form and whole groups, as the class's
``quant_predicate`` says. The result is bit for bit what that function would make of
the dequantised model; without ever holding the dequantised model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from vllm_moe_compat import execute as ex
from vllm_moe_compat.arrays import Arrays
from vllm_moe_compat.fill import make, take
from vllm_moe_compat.layout import TensorInfo
from vllm_moe_compat.plan import Build, Plan, Requantize

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
        CheckpointFileError: a tensor could not be made; ``weights`` is empty then.
        InsufficientMemoryError: likewise, for want of memory.
    """
    real: tuple[Build, ...] = ()
    # Twice at most: what sanitize computes with is no stand-in the second time.
    for _ in range(2):
        show = _show(job, weights, real)
        sanitized = dict(sanitize(show.given))
        places = {show.stand_ins[id(a)]: n for n, a in sanitized.items() if id(a) in show.stand_ins}
        lost = [b for b in job.plan.builds if b not in real and not _all_out(b, places)]
        if not lost:
            break
        real += tuple(lost)
    came_from = {n: show.origin[id(a)] for n, a in sanitized.items() if id(a) in show.origin}
    sources = show.sources
    weights.clear()
    del show

    listed = _spared(job, came_from)
    choices = choose(model, job.setting, listed)
    for name in places.values():
        del sanitized[name]
    result: dict[str, mx.array] = {}
    try:
        for build in (b for b in job.plan.builds if b not in real):
            names = [places[build, index] for index in range(len(build.targets))]
            formats = [choices.formats.get(_module(name)) for name in names]
            current = build
            dtype = job.packed_dtype if any(formats) else job.float_dtype
            result |= make(build.ops, take(build, sources), names, dtype, formats)
            mx.clear_cache()
            done(len(build.weights) + len(build.scales))
        for name in list(sanitized):
            array = sanitized.pop(name)
            packing = choices.formats.get(_module(name))
            if packing is None or not name.endswith(".weight"):
                result[name] = array
            else:
                current = Build(name, (came_from.get(name, name),), (), (packing,))
                operand = Arrays([array])
                del array
                result |= make((), operand, [name], "", [packing])
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
    given = dict(weights)
    ex.prepare(job.plan, given, job.float_dtype)
    stand_ins: dict[int, tuple[Build, int]] = {}
    sources: dict[str, mx.array] = {}
    for build in job.plan.builds:
        if build in real:
            given |= make(build.ops, take(build, given), build.targets, job.packed_dtype)
            continue
        for name in (*build.weights, *build.scales):
            sources[name] = given.pop(name)
        for index, spec in enumerate(build.results(job.tensors, "BF16")):
            stand_in = mx.zeros(spec.shape, dtype=mx.bfloat16)
            given[build.targets[index]] = stand_in
            stand_ins[id(stand_in)] = build, index
    origin = {id(array): name for name, array in given.items()}
    return _Show(given, stand_ins, origin, sources, list(given.values()))


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


def is_listed(module: str, entries: Collection[str]) -> bool:
    """Whether an entry of ``modules_to_not_convert`` names the module, its parent or its end."""
    return any(
        module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
        for entry in entries
    )


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
