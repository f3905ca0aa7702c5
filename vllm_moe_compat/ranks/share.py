"""Load a rank's share of a checkpoint: only its parts of the stored tensors are read and held.

The plan of such a load is complete: each tensor has a build, which can be restricted. Once
``sanitize`` has named the tensors, the skeleton is cut, and each build is cut as its parameters
are. Tensors that ``sanitize`` computed with have no build any more; of them a rank holds its
part, but reads the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.operations import MlxFormat
from vllm_moe_compat.execute.cut_build import between, cut_of, restricted
from vllm_moe_compat.execute.quantize import PackedBuild, SanitizedLoad
from vllm_moe_compat.execute.stored_tensors import GAP, StoredTensors
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan.cut import Cut
from vllm_moe_compat.plan.packing import Packing, Requantize
from vllm_moe_compat.ranks.group import Group
from vllm_moe_compat.ranks.shard import Cutting, shard
from vllm_moe_compat.ranks.spec import cuts_of, new_like, take
from vllm_moe_compat.ranks.summed_linear import make_packable


@dataclass(slots=True)
class Share:
    """The ``arrange`` of a load (``LoadOptions``) that makes a rank's share.

    Attributes:
        folder: the checkpoint's folder.
        group: the ranks.
        gap: bytes between two parts of a tensor that are read rather than skipped: columns of
            experts are often narrower than a page of the file system.
        cutting: what became of the model's layers, once it is cut.
        stored: the tensors that are read from the files by their parts, once it is cut.
        done: whether the load called it; a load without a plan does not.
    """

    folder: Path
    group: Group
    gap: int = GAP
    cutting: Cutting = field(default_factory=Cutting)
    stored: StoredTensors | None = None
    done: bool = False

    def __call__(self, sanitized: SanitizedLoad, model: Any) -> None:
        """Cut the model, and what the load makes for it, in place.

        Raises:
            UnsupportedServingError: the ranks cannot have equal parts, or a cut goes through
                groups of packed weights; nothing has been read.
        """
        self.done = True
        if self.group.size() == 1:
            return
        cuts = cuts_of(new_like(model), self.group)
        _check_groups(sanitized, cuts)
        classes = {path: type(module) for path, module in model.named_modules()}
        self.cutting = shard(model, self.group)
        make_packable(model, classes)
        self.stored = cut_load(sanitized, cuts, self.folder, self.gap)
        if self.cutting.whole:
            kinds = ", ".join(dict.fromkeys(self.cutting.whole.values()))
            logger.info("%s: whole on every rank: %s", self.folder, kinds)

    def cut(self, model: Any) -> None:
        """Cut a model whose load has no plan."""
        self.cutting = shard(model, self.group)


def cut_load(
    sanitized: SanitizedLoad, cuts: Mapping[str, Cut], folder: Path, gap: int = GAP
) -> StoredTensors:
    """Cut what a load makes, in place; sources are read from the files by their parts.

    Args:
        sanitized: the load.
        cuts: name of a parameter → its cut.
        folder: the checkpoint's folder.
        gap: see ``Share``.

    Returns:
        The files' tensors.
    """
    load = sanitized.load
    stored = StoredTensors(folder, load.tensors, load.plan.names, gap=gap)
    sanitized.sources = Unread({name: stored[name] for name in sanitized.sources})
    sanitized.builds = [one for packed in sanitized.builds for one in _cut(packed, sanitized, cuts)]
    for tensors in (sanitized.finished, sanitized.floats):
        for name in list(tensors):
            tensors[name] = take(name, tensors.pop(name), cuts)
    return stored


class Unread(dict[str, Any]):
    """Stored tensors that builds take. They hold no values, so several builds may take one."""

    def pop(self, name: str, *default: Any) -> Any:
        """Return a tensor, which stays."""
        return self.get(name, *default) if default else self[name]


def _cut(
    packed: PackedBuild, sanitized: SanitizedLoad, cuts: Mapping[str, Cut]
) -> list[PackedBuild]:
    mine = tuple(cut_of(name, cuts) for name in packed.names)
    if not any(mine) or packed.names[0] in sanitized.floats:
        return [packed]
    shapes = [spec.shape for spec in packed.build.results(sanitized.load.tensors, "BF16")]
    builds = restricted(packed.build, mine, shapes)
    if builds is None:
        return [replace(packed, cuts=mine)]
    if len(builds) == 1:
        return [replace(packed, build=builds[0])]
    return [
        replace(packed, build=build, names=(name,), formats=(form,))
        for build, name, form in zip(builds, packed.names, packed.formats, strict=True)
    ]


def _check_groups(sanitized: SanitizedLoad, cuts: Mapping[str, Cut]) -> None:
    """Refuse cuts that go through the groups of packed weights, before anything is read.

    Raises:
        UnsupportedServingError: one does.
    """
    shapes = {n: a.shape for n, a in (sanitized.finished | sanitized.floats).items()}
    for packed in sanitized.builds:
        specs = packed.build.results(sanitized.load.tensors, "BF16")
        shapes |= {n: spec.shape for n, spec in zip(packed.names, specs, strict=True)}
        for name, packing in zip(packed.names, packed.formats, strict=True):
            cut = cuts.get(name)
            if cut is None or packing is None or not cut.columns:
                continue
            if any(end % _group(packing) for span in cut.spans for end in span):
                raise between(name, cut)
    for name, shape in shapes.items():
        cut = cut_of(name, cuts)
        if cut is not None and cut.spans and cut.scaled(shape[cut.axis]) is None:
            raise between(name, cut)


def _group(packing: Packing) -> int:
    assert isinstance(packing, (MlxFormat, Requantize))
    return packing.group
