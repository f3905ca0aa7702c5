"""Findings: faults of a checkpoint's tensors, reported in one sentence.

The planner collects findings over the whole checkpoint and raises once, so the same fault in
forty layers is one message with folded names.
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
    """One fault of one tensor.

    Attributes:
        name: the tensor, or the name that a missing tensor should have.
        found: the finding, as the rest of a clause that begins with the name.
        expected: the expectation.
        remedy: the way to repair it.
        error: the exception that a load raises.
        rank: order of reporting, the lowest first: 0 for the content of a layer as a whole, 1
            for missing tensors, 2 for contradictions, 3 for one tensor that differs from many.
        topic: the subject: ``experts``, or the name of a number form.
    """

    name: str
    found: str
    expected: str
    remedy: str = AGAIN
    error: type[CompatError] = LayoutError
    rank: int = 2
    topic: str = "experts"

    def of(self, name: str) -> Finding:
        """Return the same fault for another tensor."""
        return replace(self, name=name)


def grouped(
    findings: Iterable[Finding], tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[Finding, str, int]]:
    """Group findings that differ only in the tensor, the lowest rank first.

    Yields:
        The first finding of a group, a message that names all its tensors, and their number.
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
    """Raise for the fault of the lowest rank, naming all tensors that share it.

    Raises:
        CompatError: there is a fault.
    """
    groups = list(grouped(findings, tensors))
    if not groups:
        return
    first, message, _ = groups[0]
    rest = sum(count for _, _, count in groups[1:])
    more = f" (and {rest} more fault{'s' if rest > 1 else ''})" if rest else ""
    raise first.error(f"{message}{more}; {first.remedy}.")
