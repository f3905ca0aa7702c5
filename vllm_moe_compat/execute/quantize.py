"""Load packed modules: from stored tensors to MLX's packed formats, one build at a time.

Modules are packed for two reasons: the user sets a format, or the checkpoint stores a weight in
numbers that MLX holds as they are (``Build.held``).

mlx-lm's ``sanitize`` renames tensors and reshapes some, and only the names in its result tell
which module a tensor belongs to. Therefore ``sanitize`` runs first, over *stand-ins*: arrays
of the right shape that take no memory, one for each target of the plan, beside the tensors
that no build makes, which are still unread. A stand-in that ``sanitize`` passes through
unchanged is recognised by identity, and its name in the result names the module. Then each
build is read, dequantised and packed, or moved into MLX's order of words, a few experts at a
time.

``sanitize`` computes with a few tensors (latent attention's ``kv_b_proj``). Their stand-ins do
not come back; those builds are made in advance, and ``sanitize`` runs a second time.

``quantization_policy`` decides the format of each module. A quantised result is bit for bit
that of mlx-lm's ``quantize_model`` on the dequantised model, which never exists as a whole.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.execute.build_tensor import make_build, make_tensors
from vllm_moe_compat.execute.cut_build import make_cut
from vllm_moe_compat.execute.quantization_policy import QuantizationPolicy, can_hold, decide
from vllm_moe_compat.execute.run_plan import failure, widen_and_drop
from vllm_moe_compat.execute.stack import Arrays
from vllm_moe_compat.families.global_scale import take_global_scale
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.cut import Cut
from vllm_moe_compat.plan.packing import Packing, Requantize
from vllm_moe_compat.plan.planner import Plan
from vllm_moe_compat.plan.quantization import commonest_held, is_listed

Weights = MutableMapping[str, mx.array]
Arrange: TypeAlias = Callable[["SanitizedLoad", Any], None]
"""Changes a ``SanitizedLoad``, and the model that it is for, before its tensors are made."""
LoadExecutor: TypeAlias = Callable[..., tuple[dict[str, mx.array], QuantizationPolicy]]
"""The signature of ``load_quantized``."""


@dataclass(frozen=True, slots=True)
class QuantizedLoad:
    """How one checkpoint is loaded and quantised.

    Attributes:
        plan: the builds, with the gate and up of combined experts split.
        tensors: the checkpoint's tensors, with the dtypes of their headers.
        setting: the format of quantised modules; None leaves floats as they are.
        spare: modules, by the checkpoint's names, that are not quantised.
        float_dtype: dtype of tensors that are dequantised and not quantised.
        packed_dtype: dtype of the values that are quantised, and of affine scales.
        corrects: whether the model computes in this process, so that its layers may get classes
            of this package. Tensors that are only written are for mlx-lm's own layers.
    """

    plan: Plan
    tensors: Mapping[str, TensorInfo]
    setting: Requantize | None
    spare: Collection[str]
    float_dtype: str
    packed_dtype: str
    corrects: bool = True


@dataclass(frozen=True, slots=True)
class PackedBuild:
    """A build with the formats of its targets, or one float tensor that is only packed.

    Attributes:
        build: the build; of a tensor that is only packed, its source and the packing.
        names: the targets' names in the result of ``sanitize``.
        formats: the format of each target; None for floats.
        dtype: dtype of dequantised values; empty for a tensor that is only packed.
        cuts: the part of each target to make; None, or no entry, for all of it.
    """

    build: Build
    names: tuple[str, ...]
    formats: tuple[Packing | None, ...]
    dtype: str = ""
    cuts: tuple[Cut | None, ...] = ()


@dataclass(slots=True)
class SanitizedLoad:
    """A load after ``sanitize`` has named its tensors and before they are read.

    Attributes:
        load: how the checkpoint is loaded.
        builds: the tensors to make.
        finished: tensors that need no build, as ``sanitize`` returned them; lazy.
        policy: the format of each module.
        sources: name → source of ``builds`` that have operations; an array, or a stored tensor
            if ``arrange`` has put it there.
        floats: name → float tensor that a build only packs.
    """

    load: QuantizedLoad
    builds: list[PackedBuild]
    finished: dict[str, mx.array]
    policy: QuantizationPolicy
    sources: dict[str, Any]
    floats: dict[str, mx.array]

    def make(self, packed: PackedBuild) -> dict[str, mx.array]:
        """Read and release a build's sources; return its tensors, evaluated.

        Raises:
            CheckpointFileError: a source cannot be read; every tensor is released.
            InsufficientMemoryError: memory ran out; every tensor is released.
        """
        try:
            if packed.names[0] in self.floats:
                operand = Arrays([self.floats.pop(packed.names[0])])
                return make_tensors((), operand, packed.names, "", packed.formats)
            if any(packed.cuts):
                shapes = [spec.shape for spec in packed.build.results(self.load.tensors, "BF16")]
                return make_cut(
                    packed.build,
                    packed.cuts,
                    shapes,
                    self.sources,
                    packed.dtype,
                    names=packed.names,
                    formats=packed.formats,
                )
            return make_build(
                packed.build,
                self.sources,
                packed.dtype,
                names=packed.names,
                formats=packed.formats,
            )
        except (RuntimeError, ValueError, MemoryError) as error:
            self.clear()
            files = {name: info.file for name, info in self.load.tensors.items()}
            raise failure(packed.build, error.with_traceback(None), files) from error

    def clear(self) -> None:
        """Release every tensor."""
        for tensors in (self.finished, self.sources, self.floats):
            tensors.clear()


def sanitize_stand_ins(
    load: QuantizedLoad,
    weights: Weights,
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    model: Any,
) -> SanitizedLoad:
    """Run ``sanitize`` over stand-ins and name the tensors to make.

    Only tensors that ``sanitize`` computes with are read.

    Args:
        load: how the checkpoint is loaded.
        weights: the loader's dict; emptied.
        sanitize: upstream's, bound to ``model``.
        model: the instance.
    """
    made_early: tuple[Build, ...] = ()
    # Two runs are enough: in the second, sanitize computes with tensors that are made.
    for _ in range(2):
        shown = _show(load, weights, made_early)
        sanitized = dict(sanitize(shown.given))
        places = {
            shown.stand_ins[id(a)]: n
            for n, a in sanitized.items()
            if id(a) in shown.stand_ins and not _is_computed(a)
        }
        consumed = [
            build
            for build in load.plan.builds
            if build not in made_early and not _all_named(build, places)
        ]
        if not consumed:
            break
        made_early += tuple(consumed)
    came_from = {n: shown.origin[id(a)] for n, a in sanitized.items() if id(a) in shown.origin}
    sources = shown.sources
    weights.clear()
    del shown

    policy = QuantizationPolicy()
    if load.setting is not None:
        policy = decide(model, load.setting, _spared(load, came_from))
    usual = commonest_held(load.plan.builds)
    modules = dict(model.named_modules()) if usual is not None else {}
    builds: list[PackedBuild] = []
    for build in (b for b in load.plan.builds if b not in made_early):
        names = tuple(places[build, index] for index in range(len(build.targets)))
        held = build.held
        if held is not None and held.global_scale and load.corrects:
            for name in names:
                take_global_scale(modules.get(_module(name)))
        if held is not None and all(can_hold(modules.get(_module(n)), held) for n in names):
            paths = dict.fromkeys(map(_module, names), held)
            policy.formats |= paths
            policy.held += len(build.weights)
            if usual is not None and held.config != usual.config:
                policy.overrides |= paths
        formats = tuple(policy.formats.get(_module(name)) for name in names)
        dtype = load.packed_dtype if any(formats) else load.float_dtype
        builds.append(PackedBuild(build, names, formats, dtype))
    for name in places.values():
        del sanitized[name]
    floats: dict[str, mx.array] = {}
    for name in list(sanitized):
        packing = policy.formats.get(_module(name))
        if isinstance(packing, Requantize) and name.endswith(".weight"):
            floats[name] = sanitized.pop(name)
            build = Build(name, (came_from.get(name, name),), (), (packing,))
            builds.append(PackedBuild(build, (name,), (packing,)))
    return SanitizedLoad(load, builds, sanitized, policy, sources, floats)


def load_quantized(
    load: QuantizedLoad,
    weights: Weights,
    sanitize: Callable[[dict[str, mx.array]], Mapping[str, mx.array]],
    model: Any,
    done: Callable[[int], object] = lambda count: None,
    arrange: Arrange | None = None,
) -> tuple[dict[str, mx.array], QuantizationPolicy]:
    """Run ``sanitize``, then make and pack every tensor.

    Args:
        load: how the checkpoint is loaded.
        weights: the loader's dict; emptied.
        sanitize: upstream's, bound to ``model``.
        model: the instance.
        done: called after each build with the number of source tensors it consumed.
        arrange: called once the tensors have their names, and before they are made.

    Returns:
        The result of ``sanitize``, quantised, and the format of each module.

    Raises:
        CheckpointFileError: a source cannot be read; ``weights`` is empty.
        InsufficientMemoryError: memory ran out; ``weights`` is empty.
    """
    sanitized = sanitize_stand_ins(load, weights, sanitize, model)
    if arrange is not None:
        try:
            arrange(sanitized, model)
        except CompatError:
            sanitized.clear()
            raise
    result: dict[str, mx.array] = {}
    try:
        for packed in sanitized.builds:
            result |= sanitized.make(packed)
            mx.clear_cache()
            done(len(packed.build.sources))
    except CompatError:
        result.clear()
        raise
    finally:
        mx.clear_cache()
    done(len(sanitized.finished))
    return result | sanitized.finished, sanitized.policy


def _module(name: str) -> str:
    return name.removesuffix(".weight")


@dataclass(slots=True)
class _Shown:
    """The argument of ``sanitize``, with the means to recognise its arrays by identity.

    Attributes:
        given: the argument.
        stand_ins: id of a stand-in → its build, and the index among the build's targets.
        origin: id of any array → its name in ``given``.
        sources: name → source of the builds that have stand-ins.
        keep: the arrays themselves, since an id is unique only while its object lives.
    """

    given: dict[str, mx.array]
    stand_ins: dict[int, tuple[Build, int]]
    origin: dict[int, str]
    sources: dict[str, mx.array]
    keep: list[mx.array]


def _show(
    load: QuantizedLoad, weights: Mapping[str, mx.array], made_early: Collection[Build]
) -> _Shown:
    """Replace the plan's sources by stand-ins, or by the targets of ``made_early``."""
    # New handles: `param *= x` in a sanitize would change the array that the loader holds.
    given = {name: array.astype(array.dtype) for name, array in weights.items()}
    widen_and_drop(load.plan, given, load.float_dtype)
    stand_ins: dict[int, tuple[Build, int]] = {}
    sources: dict[str, mx.array] = {}
    for build in load.plan.builds:
        if build in made_early:
            dtype = load.float_dtype if load.setting is None else load.packed_dtype
            given |= make_build(build, given, dtype)
            continue
        for name in build.sources:
            sources[name] = given.pop(name)
        for index, spec in enumerate(build.results(load.tensors, "BF16")):
            # One evaluated number, broadcast: an operation on it shows in the graph. What is not
            # made by an operation keeps its dtype, to which ``sanitize`` may look.
            kind = mx.bfloat16 if build.ops else weights[build.weights[0]].dtype
            stand_in = mx.broadcast_to(mx.array(0, dtype=kind), spec.shape)
            mx.eval(stand_in)
            given[build.targets[index]] = stand_in
            stand_ins[id(stand_in)] = build, index
    origin = {id(array): name for name, array in given.items()}
    return _Shown(given, stand_ins, origin, sources, list(given.values()))


def _is_computed(array: mx.array) -> bool:
    """Whether an in-place operation is pending on an array that was evaluated before."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return "label" in graph.getvalue()


def _all_named(build: Build, places: Mapping[tuple[Build, int], str]) -> bool:
    return all((build, index) in places for index in range(len(build.targets)))


def _spared(load: QuantizedLoad, came_from: Mapping[str, str]) -> Callable[[str], bool]:
    """Return a test for modules whose tensor, or its first source, is in a spared module."""
    if not load.spare:
        return lambda path: False
    made_of = {target: build.weights for build in load.plan.builds for target in build.targets}

    def is_spared(path: str) -> bool:
        name = came_from.get(f"{path}.weight", "")
        return any(is_listed(_module(n), load.spare) for n in (name, *made_of.get(name, ())[:1]))

    return is_spared
