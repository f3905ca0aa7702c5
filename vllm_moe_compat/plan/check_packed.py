"""Find packed numbers that neither the mlx-lm module nor this package reads.

mlx-lm's strict load would refuse them with a list of parameter names, or read them as another
packed form and generate nonsense. MLX's own packed form (``weight``, ``scales``, ``biases``)
and the published forms in the row's ``keeps`` are left to mlx-lm.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_moe_compat.checkpoint.findings import CONVERT, Finding
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.row import Row

_ENDINGS = {
    ".qweight": "gptq",
    ".qzeros": "gptq",
    ".g_idx": "gptq",
    "_packed": "compressed-tensors",
    "weight_shape": "compressed-tensors",
    "_global_scale": "nvfp4",
    "_scale_2": "nvfp4",
    "_blocks": "mxfp4 blocks",
}
"""Ending of a tensor's name → the published form that it identifies."""
_ANY_ENDING = tuple(_ENDINGS)
_EXPECTED = "floats, FP8, packed integers, or weights packed in MLX's own form"


def is_packed_name(name: str) -> bool:
    """Whether a tensor's name identifies a published packed form."""
    return name.endswith(_ANY_ENDING)


def check_packed(layout: Layout, row: Row) -> Iterator[Finding]:
    """Yield the packed tensors that nothing reads."""
    forms: dict[str, list[str]] = {}
    read = layout.numbers.tensors
    for name in layout.tensors:
        if is_packed_name(name) and name not in read:
            form = next(form for end, form in _ENDINGS.items() if name.endswith(end))
            forms.setdefault(form, []).append(name)
    if "nvfp4" in forms:
        # NVFP4 as compressed-tensors writes it has ``_global_scale`` beside ``_packed``.
        forms["nvfp4"] += forms.pop("compressed-tensors", [])
    for form, names in forms.items():
        if form not in row.keeps:
            for name in names:
                yield Finding(
                    name,
                    f"is packed as {form}, which {row.module} does not take",
                    _EXPECTED,
                    remedy=CONVERT,
                    error=UnsupportedCheckpointError,
                    rank=1,
                    topic="packed",
                )
