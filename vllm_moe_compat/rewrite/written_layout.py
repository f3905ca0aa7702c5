"""Layouts to write, and the builds that would load a checkpoint in such a layout.

A plan leads from a checkpoint to stacked experts; the inverses of these builds lead back. Names
come from the registry row: ``Moe.sources`` and ``Moe.spelling``.
Axes: ``E`` experts, ``I`` intermediate, ``H`` hidden; gate and up are ``[E, I, H]`` when
stacked, down is ``[E, H, I]``, their biases ``[E, I]`` and ``[E, H]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vllm_moe_compat.checkpoint.experts import PROJECTIONS
from vllm_moe_compat.checkpoint.numbers.form import WrittenNumbers, WrittenWeights
from vllm_moe_compat.checkpoint.operations import Op
from vllm_moe_compat.errors import SettingError, UnsupportedCheckpointError
from vllm_moe_compat.families.row import COMBINED, GLU, PER_EXPERT, TRANSPOSED, Moe
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.ops import SplitGateUp, StackExperts, Transpose

STACKED = "stacked"
LAYOUTS = (PER_EXPERT, COMBINED, TRANSPOSED, STACKED)


@dataclass(frozen=True, slots=True)
class WrittenLayout:
    """The layout in which a checkpoint is written.

    Attributes:
        experts: layout of the routed experts: a matrix per expert (``PER_EXPERT``); gate and up
            of all experts in one ``[E, 2I, H]`` (``COMBINED``) or ``[E, H, 2I]``
            (``TRANSPOSED``); gate and up ``[E, I, H]`` each (``STACKED``).
        spelling: names of gate, up and down of per-expert weights; the row's if empty.
        numbers: stored number form of experts and linear layers; None for floats.
        home: path of the experts, one of ``Moe.sources``; if empty, the first that can have
            the layout.

    Raises:
        SettingError: the layout or a projection is unknown.
    """

    experts: str = PER_EXPERT
    spelling: tuple[str, ...] = ()
    numbers: WrittenNumbers | None = None
    home: str = ""

    def __post_init__(self) -> None:
        if self.experts not in LAYOUTS:
            known = ", ".join(map(repr, LAYOUTS))
            raise SettingError(f"layout is {self.experts!r}, where one of {known} was expected.")
        if unknown := [name for name in self.spelling if name not in PROJECTIONS]:
            known = ", ".join(PROJECTIONS)
            raise SettingError(f"spelling has {unknown[0]!r}, where one of {known} was expected.")

    def stored(self, shape: tuple[int, ...], *weights: str) -> WrittenWeights:
        """Return parts and operations for weights of ``shape`` ``[…, O, I]``; biases are floats."""
        if self.numbers is None or weights[0].endswith("bias"):
            return WrittenWeights()
        return self.numbers.write(shape, *weights)


@dataclass(frozen=True, slots=True)
class Part:
    """Name and shape of one stacked tensor: a weight ``[E, O, I]`` or a bias ``[E, O]``."""

    name: str
    shape: tuple[int, ...]


def builds_of(
    layout: WrittenLayout, moe: Moe, prefix: str, parts: Mapping[tuple[str, str], Part]
) -> Iterator[Build]:
    """Yield the builds that would stack one layer's experts of a checkpoint in the layout.

    Args:
        layout: the checkpoint's layout.
        moe: names and layouts of the module's experts.
        prefix: prefix of the layer's names: ``model.layers.0.``.
        parts: part and kind, ``("gate", "weight")`` → the stacked tensor.

    Raises:
        SettingError: the layout names a path or a spelling that the row does not have.
        UnsupportedCheckpointError: the module's experts cannot be written in the layout.
    """
    kinds = [kind for kind in ("weight", "bias") if any(key[1] == kind for key in parts)]
    projections = dict(moe.projections)
    if layout.experts == STACKED:
        for (part, kind), stacked in parts.items():
            name = f"{prefix}{moe.target}.{projections[part]}.{kind}"
            stored = layout.stored(stacked.shape, name)
            yield Build(stacked.name, (name,), stored.parts, stored.ops)
        return
    home = f"{prefix}{_home(layout, moe)}"
    if layout.experts == PER_EXPERT:
        spelled = dict(zip(projections, _spelling(layout, moe), strict=True))
        for (part, kind), stacked in parts.items():
            experts, *shape = stacked.shape
            names = tuple(f"{home}.{e}.{spelled[part]}.{kind}" for e in range(experts))
            stored = layout.stored(tuple(shape), *names)
            ops = (StackExperts(experts), *stored.ops)
            yield Build(stacked.name, names, stored.parts, ops)
        return
    for kind in kinds:
        for part in ("gate" if moe.gated else "up", "down"):
            yield _combined(layout, moe, home, parts, part, kind)


def _combined(
    layout: WrittenLayout,
    moe: Moe,
    home: str,
    parts: Mapping[tuple[str, str], Part],
    part: str,
    kind: str,
) -> Build:
    """Return the build of gate and up from ``[E, 2I, H]``, of down, or of an up without a gate."""
    first = parts[part, kind]
    _, *rest = first.shape
    joined = part == "gate"
    shape = (*first.shape[:-2], first.shape[-2] * (1 + joined), first.shape[-1])
    turned: tuple[Op, ...] = ()
    if layout.experts == TRANSPOSED and kind == "weight":
        shape, turned = (*shape[:-2], shape[-1], shape[-2]), (Transpose(),)
        if not moe.gated and rest[0] == rest[1] and not moe.transposed:
            raise UnsupportedCheckpointError(
                f"{first.name} of {list(first.shape)} does not show whether it is transposed, "
                f"where two sides were expected to differ; write it as {COMBINED!r}."
            )
    spelled = {"gate": "gate_up_proj", "up": "up_proj", "down": "down_proj"}[part]
    ending = "_bias" if kind == "bias" else ""
    if _linear(moe) and home.endswith(moe.sources[0]):
        spelled, ending = moe.spelling[0 if joined else 1], f".{kind}"
    name = f"{home}.{spelled}{ending}"
    stored = layout.stored(shape, name)
    ops = (*stored.ops, *turned)
    if not joined:
        return Build(first.name, (name,), stored.parts, ops)
    split = SplitGateUp(moe.interleaved, -2 if kind == "weight" else -1)
    return Build(first.name, (name,), stored.parts, (*ops, split), (parts["up", kind].name,))


def _linear(moe: Moe) -> bool:
    """Whether combined experts are Granite's ``input_linear`` and ``output_linear``."""
    return moe.spelling[0].endswith("_linear")


def _home(layout: WrittenLayout, moe: Moe) -> str:
    if layout.home:
        if layout.home not in moe.sources:
            known = " or ".join(moe.sources)
            raise SettingError(f"home is {layout.home!r}, where {known} was expected.")
        return layout.home
    if layout.experts != PER_EXPERT:
        if _linear(moe):
            return moe.sources[0]
        homes = [source for source in moe.sources if source.endswith("experts")]
    else:
        homes = [source for source in moe.sources if source.endswith(("experts", "moe.mlp"))]
    if not homes:
        raise UnsupportedCheckpointError(
            f"experts under {' or '.join(moe.sources)} cannot be written as {layout.experts!r}, "
            f"where {PER_EXPERT!r} or {STACKED!r} was expected; write them as one of these."
        )
    return homes[0]


def _spelling(layout: WrittenLayout, moe: Moe) -> tuple[str, ...]:
    """Return the projections' names in the order of ``moe.projections``."""
    count = len(moe.projections)
    names = layout.spelling or (GLU if _linear(moe) else moe.spelling[:3])
    found = tuple(names[len(names) - count :]) if len(names) >= count else ()
    meant = [part for part, _ in moe.projections]
    if [PROJECTIONS.get(name) for name in found] != meant:
        raise SettingError(f"spelling is {names}, where names of {', '.join(meant)} were expected.")
    return found
