"""What can be wrong with a checkpoint, told in one sentence.

The planner collects ``Finding``s over the whole checkpoint and raises once, so
that the same fault in forty layers is one message with folded names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from vllm_moe_compat.errors import CompatError, LayoutError
from vllm_moe_compat.layout import TensorInfo, fold

AGAIN = "download the checkpoint again, or repair the conversion that wrote it"
CONVERT = "load a bf16 or FP8 release of the model instead"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of one tensor; equal faults are told together.

    Attributes:
        name: the tensor, or the place where it should be.
        found: what is there, as the rest of a clause that begins with the name.
        expected: what should be.
        remedy: what to do about it.
        error: the exception that it becomes.
        rank: which of several faults is told, the lowest first: 0 for what a layer
            holds at all, 1 for what is missing, 2 for what does not belong, 3 for
            one tensor among many.
    """

    name: str
    found: str
    expected: str
    remedy: str = AGAIN
    error: type[CompatError] = LayoutError
    rank: int = 2

    def of(self, name: str) -> Finding:
        """Return the same fault of another tensor."""
        return replace(self, name=name)


def refuse(findings: Iterable[Finding], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise for the gravest fault, naming all the tensors that share it."""
    ordered = sorted(findings, key=lambda finding: finding.rank)
    if not ordered:
        return
    first = ordered[0]
    alike = [
        other.name
        for other in ordered
        if (other.found, other.expected, other.error) == (first.found, first.expected, first.error)
    ]
    files = sorted({tensors[name].file for name in alike if name in tensors} - {""})
    where = ""
    if files:
        where = files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "") + ": "
    rest = len(ordered) - len(alike)
    more = f" (and {rest} more fault{'s' if rest > 1 else ''})" if rest else ""
    raise first.error(
        f"{where}{fold(alike)} {first.found}, expected {first.expected}{more}; {first.remedy}."
    )
