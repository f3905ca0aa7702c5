"""Find packed numbers that neither the mlx-lm module nor this package reads.

mlx-lm's strict load would refuse them with a list of parameter names, or read them as another
packed form and generate nonsense. MLX's own packed form (``weight``, ``scales``, ``biases``)
and the published forms in the row's ``keeps`` are left to mlx-lm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs
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
INT4 = "compressed-tensors int4"
_EXPECTED = "floats, FP8, or weights packed in MLX's own form"


def check_packed(layout: Layout, row: Row, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the packed tensors that nothing reads."""
    forms: dict[str, list[str]] = {}
    for name in layout.tensors:
        if name.endswith(_ANY_ENDING):
            form = next(form for end, form in _ENDINGS.items() if name.endswith(end))
            forms.setdefault(form, []).append(name)
    if "nvfp4" in forms:
        # NVFP4 as compressed-tensors writes it has ``_global_scale`` beside ``_packed``.
        forms["nvfp4"] += forms.pop("compressed-tensors", [])
    for form, names in forms.items():
        if not _is_read(form, names, row, config):
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


def _is_read(form: str, names: list[str], row: Row, config: Mapping[str, Any]) -> bool:
    if form in row.keeps:
        return True
    entry = next(iter(quantization_configs(config)), {})
    if form == "compressed-tensors":
        return INT4 in row.keeps and _bits(entry) == {4}
    # load_model unpacks AWQ after sanitize: linear layers, but not experts, which sanitize
    # would have to stack before.
    awq = form == "gptq" and entry.get("quant_method") == "awq" and entry.get("bits", 4) == 4
    return awq and not any(".experts." in name or name.endswith(".g_idx") for name in names)


def _bits(entry: Mapping[str, Any]) -> set[Any]:
    """Return the bit widths of all groups in a compressed-tensors config."""
    groups = entry.get("config_groups")
    each = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in each if isinstance(group, Mapping)]
    found = {w.get("num_bits", 4) for w in weights if isinstance(w, Mapping)}
    return found or {4}
