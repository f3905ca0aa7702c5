"""What can be wrong with a checkpoint, told in one sentence.

The planner collects ``Finding``s over the whole checkpoint and raises once, so
that the same fault in forty layers is one message with folded names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.errors import CompatError, LayoutError

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
        topic: what the fault is about: ``experts``, or the name of a number form.
    """

    name: str
    found: str
    expected: str
    remedy: str = AGAIN
    error: type[CompatError] = LayoutError
    rank: int = 2
    topic: str = "experts"

    def of(self, name: str) -> Finding:
        """Return the same fault of another tensor."""
        return replace(self, name=name)


def grouped(
    findings: Iterable[Finding], tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[Finding, str, int]]:
    """Yield equal faults as one, the gravest first.

    Yields:
        The first of them, what it says of all their tensors, and how many they are.
    """
    alike: dict[tuple[str, str, type[CompatError]], list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: finding.rank):
        alike.setdefault((finding.found, finding.expected, finding.error), []).append(finding)
    for group in alike.values():
        first, names = group[0], [finding.name for finding in group]
        files = sorted({tensors[name].file for name in names if name in tensors} - {""})
        where = ""
        if files:
            where = files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "") + ": "
        message = f"{where}{fold(names)} {first.found}, expected {first.expected}"
        yield first, message, len(group)


def refuse(findings: Iterable[Finding], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise for the gravest fault, naming all the tensors that share it."""
    groups = list(grouped(findings, tensors))
    if not groups:
        return
    first, message, _ = groups[0]
    rest = sum(count for _, _, count in groups[1:])
    more = f" (and {rest} more fault{'s' if rest > 1 else ''})" if rest else ""
    raise first.error(f"{message}{more}; {first.remedy}.")
