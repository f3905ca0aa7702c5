"""A checkpoint's multi-token-prediction heads, and the planned load of the first one.

The head's decoder layer is of the target's kind, so it is planned as a model of its own
(``head_view``) and checked against the target's layers (``check_heads``): whether it can be used
is known from headers alone. Only the first of several heads is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_moe_compat.checkpoint.config import layer_count, sections
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.dtypes import STORED_NAMES, nbytes
from vllm_moe_compat.errors import CompatError, LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.families.prediction_heads import COUNT_KEYS, HEADS_BY_MODULE, PredictionHead
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.check_heads import AGAIN
from vllm_moe_compat.plan.estimate import estimate
from vllm_moe_compat.plan.faults import Fault
from vllm_moe_compat.plan.head_names import head_names, like_heads
from vllm_moe_compat.plan.head_view import view_head
from vllm_moe_compat.plan.planned_load import PlannedLoad

WITHOUT = "use --speculative-config without mtp"


@dataclass(frozen=True, slots=True)
class FoundHeads:
    """The prediction heads of a checkpoint.

    Attributes:
        stated: their number by the config; None if it says nothing.
        tensors: name → tensor of all heads.
        facts: how the family's heads are stored; None for an unknown family.
        view: the planned load of the first head; None if it cannot be used.
        faults: why it cannot be used.
    """

    stated: int | None
    tensors: Mapping[str, TensorInfo]
    facts: PredictionHead | None = None
    view: PlannedLoad | None = None
    faults: tuple[Fault, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all heads in the files."""
        return sum(nbytes(info.dtype, info.shape) for info in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the first head's weights once it is loaded; 0 if it cannot be used."""
        if self.view is None or self.view.plan is None or self.view.layout is None:
            return 0
        serving = self.view.serving
        needs = estimate(
            self.view.plan,
            self.view.layout.tensors,
            STORED_NAMES[serving.dtype],
            STORED_NAMES[serving.packed_dtype],
            {serving.setting: self.view.spared(serving.setting)},
        )
        return needs.final[serving.setting]

    def usable(self) -> PlannedLoad:
        """Return the planned load of the first head.

        Raises:
            CompatError: it cannot be used.
        """
        if self.view is None:
            first, *others = self.faults
            rest = sum(fault.count for fault in others)
            more = f" (and {rest} more fault{'s' if rest > 1 else ''})" if rest else ""
            remedy = f"{first.remedy}, or {WITHOUT}" if first.remedy else WITHOUT
            raise first.error(
                f"the prediction head cannot be used: {first.message}{more}; {remedy}."
            )
        return self.view


def find_heads(planned: PlannedLoad) -> FoundHeads:
    """Find a checkpoint's prediction heads, and plan the load of the first one.

    Args:
        planned: the target's load, without faults.
    """
    stated = next(
        (
            section[key]
            for section in sections(planned.original)
            for key in COUNT_KEYS
            if type(section.get(key)) is int
        ),
        None,
    )
    name = planned.module.rpartition(".")[2]
    facts = HEADS_BY_MODULE.get(name)
    if planned.row is None or planned.layout is None or planned.plan is None:
        fault = _fault("heads-unknown", f"{name or 'the model'} has no row in the registry")
        return FoundHeads(stated, {}, faults=(fault,))
    try:
        return _find(planned, planned.row, facts, stated)
    except CompatError as error:
        fault = Fault("heads-incomplete", str(error).rstrip("."), "", type(error))
    except (ValueError, ArithmeticError, LookupError) as error:
        words = f"the shapes of its tensors do not fit the planned operations ({error})"
        fault = Fault("heads-incomplete", words, AGAIN, LayoutError)
    return FoundHeads(stated, like_heads(planned), facts, faults=(fault,))


def _find(
    planned: PlannedLoad, row: Row, facts: PredictionHead | None, stated: int | None
) -> FoundHeads:
    config = planned.config
    count = layer_count(config) or 0
    others = like_heads(planned)
    if facts is None:
        return FoundHeads(stated, others, faults=(_unknown(planned, others, stated),))
    names = head_names(planned, row, facts, count)
    if names is None:
        absent = _unknown(planned, others, stated) if others else _absent(planned, stated)
        return FoundHeads(stated, others, facts, faults=(absent,))
    tensors = {**others, **{n: planned.headers.tensors[n] for n in names.every}}
    if _is_mlx(planned):
        fault = _fault(
            "heads-unknown",
            f"{fold(names.every)} are in a folder that mlx-lm or this package has converted, where "
            "no head was expected, since converting leaves heads out; so it is not known what "
            "they were made of",
            "serve the release that the folder was made from",
        )
        return FoundHeads(stated, tensors, facts, faults=(fault,))
    view, faults = view_head(planned, row, facts, names, count)
    return FoundHeads(stated, tensors, facts, None if faults else view, tuple(faults))


def _is_mlx(planned: PlannedLoad) -> bool:
    """Whether the folder is in MLX's form, which no release with heads has."""
    moe = None if planned.row is None else planned.row.moe
    stacked = f".{moe.target}." if moe is not None and "switch" in moe.target else None
    assert planned.layout is not None, "it was checked"
    return isinstance(planned.original.get("quantization"), Mapping) or any(
        (name.endswith(".weight") and info.dtype == "U32")
        or (stacked is not None and stacked in name)
        for name, info in planned.layout.tensors.items()
    )


def _fault(id: str, message: str, remedy: str = "", count: int = 1) -> Fault:
    return Fault(id, message, remedy, UnsupportedCheckpointError, count)


def _unknown(planned: PlannedLoad, others: Mapping[str, TensorInfo], stated: int | None) -> Fault:
    if not others:
        return _absent(planned, stated)
    known = ", ".join(HEADS_BY_MODULE)
    return _fault(
        "heads-unknown",
        f"{planned.headers.folder}: the prediction heads of {planned.module} ({fold(others)}) are "
        f"not known here, where those of one of {known} were expected",
    )


def _absent(planned: PlannedLoad, stated: int | None) -> Fault:
    says = f"though config.json says that there {'is' if stated == 1 else 'are'} {stated}"
    return _fault(
        "heads-absent",
        f"{planned.headers.folder}: the checkpoint has no tensors of a prediction head"
        + (f", {says}" if stated else "")
        + (", and a folder in MLX's form never has" if _is_mlx(planned) else ""),
        "serve a release that has them",
    )
