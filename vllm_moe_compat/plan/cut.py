"""A ``Cut``: the part of one parameter that a rank holds, as data."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_moe_compat.plan.build import Span


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a parameter that a rank holds.

    Attributes:
        whole: shape of the whole parameter, as floats.
        axis: the axis that is cut, from 0.
        spans: the parts of the axis that the rank holds, joined in this order. They are several
            where the parameter consists of several, as a fused projection does.
        factor: what the values are multiplied by: a bias that every rank adds is divided.
    """

    whole: tuple[int, ...]
    axis: int = 0
    spans: tuple[Span, ...] = ()
    factor: float = 1.0

    @property
    def size(self) -> int:
        """Length of the axis on this rank."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def columns(self) -> bool:
        """Whether the last axis is cut, along which packed numbers lie."""
        return bool(self.spans) and len(self.whole) > 1 and self.axis == len(self.whole) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rank's part."""
        if not self.spans:
            return self.whole
        return (*self.whole[: self.axis], self.size, *self.whole[self.axis + 1 :])

    def scaled(self, length: int) -> tuple[Span, ...] | None:
        """Return the spans of an axis that has ``length`` words or scales for the values.

        None if a span does not begin and end between them.
        """
        whole = self.whole[self.axis]
        if any(end * length % whole for span in self.spans for end in span):
            return None
        return tuple(
            (start * length // whole, stop * length // whole) for start, stop in self.spans
        )
