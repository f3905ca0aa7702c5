"""What is written down about one mlx-lm module: the form of a registry row.

The rows themselves are data, in ``registry``; the planner reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_moe_compat.layout import Extras


@dataclass(frozen=True, slots=True)
class Workaround:
    """One thing that upstream does not do yet, shared by the rows that need it.

    Attributes:
        id: short name, for tables and messages.
        why: what goes wrong without it.
        upstream: where upstream discusses it, or where its code is.
        remove_when: the condition on which the workaround goes.
        form: the checkpoint form that it serves.
    """

    id: str
    why: str
    upstream: str
    remove_when: str
    form: str


@dataclass(frozen=True, slots=True)
class Moe:
    """Where a module's routed experts are in checkpoints, and where it wants them.

    Attributes:
        source: path of the experts in the checkpoint's layer.
        target: path of the stacked experts in the module's layer.
        projections: names in the checkpoint → names in the module.
    """

    source: str
    target: str
    projections: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Tensors that a module's ``sanitize`` computes with, in the checkpoint's dtype.

    Attributes:
        suffixes: how their names end.
        marker: how the name of a tensor ends whose last axis is not 1 exactly
            in checkpoints that ``sanitize`` has not seen yet.
    """

    suffixes: tuple[str, ...]
    marker: str


@dataclass(frozen=True, slots=True)
class Row:
    """What is known about one mlx-lm module.

    Attributes:
        module: its import path; the class is its ``Model``.
        workarounds: what is done for it, and until when.
        moe: its experts' convention; None for a dense module.
        extras: names that its ``sanitize`` drops.
        drops: extras that it does not drop and the executor must.
        arithmetic: what it computes with, which float32 serving wants in float32.
    """

    module: str
    workarounds: tuple[Workaround, ...]
    moe: Moe | None = None
    extras: Extras = field(default_factory=Extras)
    drops: Extras = field(default_factory=Extras)
    arithmetic: Arithmetic | None = None

    @property
    def ignored(self) -> Extras:
        """All names that play no part in the model, whoever drops them."""
        return Extras(
            self.extras.prefixes + self.drops.prefixes, self.extras.parts + self.drops.parts
        )
