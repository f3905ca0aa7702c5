"""A layout to write, and the builds that would load a checkpoint written in it.

A plan goes from a checkpoint to MLX's stacked experts; writing goes the other way: these
builds, inverted. Names come from the registry row: ``Moe.sources`` and ``Moe.spelling``.
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
    """How a checkpoint is to be written.

    Attributes:
        experts: layout of the routed experts: one matrix each (``PER_EXPERT``), gate and up
            of all in one ``[E, 2I, H]`` (``COMBINED``) or ``[E, H, 2I]`` (``TRANSPOSED``),
            or MLX's own ``[E, I, H]`` each (``STACKED``).
        spelling: names of gate, up and down where each expert has its own; the row's
            where none are given.
        numbers: the stored number form of experts and linear layers; None writes floats.
        home: the source of the row that the experts go to; else the first that can hold
            the layout.

    Raises:
        SettingError: there is no such layout or projection.
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
        """Say how weights of ``shape`` ``[…, O, I]`` are stored; biases are floats."""
        if self.numbers is None or weights[0].endswith("bias"):
            return WrittenWeights()
        return self.numbers.write(shape, *weights)


@dataclass(frozen=True, slots=True)
class Part:
    """One stacked tensor: its name, and its shape ``[E, O, I]`` or, a bias, ``[E, O]``."""

    name: str
    shape: tuple[int, ...]


def builds_of(
    layout: WrittenLayout, moe: Moe, prefix: str, parts: Mapping[tuple[str, str], Part]
) -> Iterator[Build]:
    """Yield the builds that stack one layer's experts of a checkpoint in the layout.

    Args:
        layout: of the checkpoint.
        moe: the module's convention.
        prefix: of the layer's names: ``model.layers.0.``.
        parts: gate, up or down, and ``weight`` or ``bias`` → the stacked tensor.

    Raises:
        SettingError: the layout names a source or a spelling that the row does not have.
        UnsupportedCheckpointError: experts of this module cannot be written so.
    """
    kinds = [kind for kind in ("weight", "bias") if any(key[1] == kind for key in parts)]
    into = dict(moe.projections)
    if layout.experts == STACKED:
        for (part, kind), stacked in parts.items():
            name = f"{prefix}{moe.target}.{into[part]}.{kind}"
            stored = layout.stored(stacked.shape, name)
            yield Build(stacked.name, (name,), stored.parts, stored.ops)
        return
    home = f"{prefix}{_home(layout, moe)}"
    if layout.experts == PER_EXPERT:
        spelled = dict(zip(into, _spelling(layout, moe), strict=True))
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
    """Build gate and up from ``[E, 2I, H]``, or down, or an up that has no gate."""
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
            f"which no checkpoint of theirs is; write them as {PER_EXPERT!r} or {STACKED!r}."
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
