"""A rewrite plan as data: steps of builds and their inverses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vllm_moe_compat.checkpoint.operations import Dequantize, Invertible
from vllm_moe_compat.plan.build import Build


@dataclass(frozen=True, slots=True)
class Write:
    """The inverse of a build.

    Attributes:
        sources: names of the source tensors: the build's targets.
        ops: the inverses of the build's operations, in reverse order.
        weights: names of the written weights: the build's sources.
        parts: pairs of role and further written tensors; empty for floats.
    """

    sources: tuple[str, ...]
    ops: tuple[Invertible, ...]
    weights: tuple[str, ...]
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all written tensors."""
        return (*self.weights, *(name for _, names in self.parts for name in names))


def invert(build: Build) -> Write:
    """Return the inverse of a build.

    Raises:
        TypeError: an operation cannot be undone.
    """
    ops: list[Invertible] = []
    for op in reversed(build.ops):
        if not isinstance(op, Invertible):
            raise TypeError(f"{op.words} cannot be undone")
        ops.append(op.inverse())
    return Write(build.targets, tuple(ops), build.weights, build.parts)


@dataclass(frozen=True, slots=True)
class RewriteStep:
    """One step of a rewrite; no other step's tensors are in memory at the same time.

    Attributes:
        builds: builds of the stacked tensors; empty if the checkpoint has them.
        writes: inverse builds of the wanted tensors, from the stacked ones.
        stays_stored: whether weights stay in their stored number form; operations then apply
            to weights and parts alike.
    """

    builds: tuple[Build, ...]
    writes: tuple[Write, ...]
    stays_stored: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether the step quantises to a stored form, which requires float32 products."""
        return any(
            isinstance(op.inverse(), Dequantize) for write in self.writes for op in write.ops
        )


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """The steps that write a checkpoint in another layout.

    Attributes:
        steps: the steps, in the order of the checkpoint's tensors.
        kept: names of tensors that are written unchanged.
    """

    steps: tuple[RewriteStep, ...]
    kept: tuple[str, ...]

    def without(self, names: Collection[str]) -> RewritePlan:
        """Return the plan without steps that only write tensors of these names."""
        steps = (s for s in self.steps if any(n not in names for w in s.writes for n in w.names))
        return RewritePlan(tuple(steps), tuple(name for name in self.kept if name not in names))
