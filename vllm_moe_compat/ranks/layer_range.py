"""Load a range of a model's layers: nothing of the others is read.

Once ``sanitize`` has named the tensors of a load, those of other ranks' layers are taken out.
Tensors that ``sanitize`` computed with have been read by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_moe_compat.execute.quantize import PackedBuild, SanitizedLoad
from vllm_moe_compat.ranks.pipeline import Transport, keep_range


@dataclass(slots=True)
class Range:
    """The ``arrange`` of a load (``LoadOptions``) that makes a rank's range of layers.

    Attributes:
        of: the first layer and the one after the last, by the number of layers.
        transport: between the ranks.
        done: whether the load called it; a load without a plan does not.
    """

    of: Callable[[int], tuple[int, int]]
    transport: Transport
    done: bool = False

    def __call__(self, sanitized: SanitizedLoad, model: Any) -> None:
        """Take the layers of other ranks out of the model, and out of what the load makes.

        Raises:
            UnsupportedServingError: the model cannot be divided; nothing has been read.
        """
        self.done = True
        absent = tuple(f"{path}." for path in self.cut(model))

        def is_absent(name: str) -> bool:
            return name.startswith(absent)

        sanitized.builds = [
            kept for one in sanitized.builds if (kept := _without(one, is_absent)) is not None
        ]
        used = {source for one in sanitized.builds for source in one.build.sources}
        for source in set(sanitized.sources) - used:
            del sanitized.sources[source]
        for tensors in (sanitized.finished, sanitized.floats):
            for name in [name for name in tensors if is_absent(name)]:
                del tensors[name]

    def cut(self, model: Any) -> list[str]:
        """Take the layers of other ranks out of a model; return their paths."""
        begin, end = self.of(len(model.layers))
        layers = list(model.layers)
        others = {id(layer) for layer in (*layers[:begin], *layers[end:])}
        absent = [path for path, module in model.named_modules() if id(module) in others]
        keep_range(model, begin, end, self.transport)
        return absent


def _without(one: PackedBuild, is_absent: Callable[[str], bool]) -> PackedBuild | None:
    """Return a build if some of its tensors are of this rank."""
    return None if all(map(is_absent, one.names)) else one
