"""Find quantised forms that neither mlx-lm nor this package reads, and name them.

mlx-lm ignores a ``quant_method`` that it does not know and refuses the tensors by thousands of
names, or loads their bytes as numbers. Names of tensors identify a form even if the config is
silent, as after a merge or a conversion. A method that nobody knows and an integer weight that
no form explains are refused as well, so a form to come is not taken for another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vllm_moe_compat.checkpoint import numbers
from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.checkpoint.findings import AGAIN, Finding
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.dtypes import FLOATS
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.check_packed import is_packed_name
from vllm_moe_compat.plan.quantization import DEQUANTIZED

OTHER_RELEASE = "load a release of the model in bf16, FP8 or MLX's own form instead"
_TRANSFORMERS = (
    "load a release of the model in bf16, FP8 or MLX's own form instead, or let transformers "
    "dequantise this one (`model.dequantize()`) and save it"
)
_GGUF = "serve the GGUF file with llama.cpp, or load a bf16 release of the model instead"
_EXPECTED = "floats, or numbers in a form that mlx-lm or this package reads"


class Unreadable(NamedTuple):
    """A published form that nobody here reads.

    Attributes:
        title: its name for people.
        methods: values of ``quant_method``.
        endings: endings of tensor names that occur in this form only.
        remedy: what to do.
    """

    title: str
    methods: tuple[str, ...]
    endings: tuple[str, ...] = ()
    remedy: str = OTHER_RELEASE


UNREADABLE = (
    Unreadable(
        "bitsandbytes",
        ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
        (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format"),
        _TRANSFORMERS,
    ),
    Unreadable(
        "torchao",
        ("torchao",),
        ("_qdata", ":qdata", "_scale_and_zero", "_per_tensor_scale", "_act_pre_scale"),
    ),
    Unreadable("HQQ", ("hqq",), (".W_q",), _TRANSFORMERS),
    Unreadable("SINQ", ("sinq",)),
    Unreadable("EETQ", ("eetq",), (".weight_scales",)),
    Unreadable("VPTQ", ("vptq",), (".centroids.weight", ".centroids", ".res_centroids.weight")),
    Unreadable("AQLM", ("aqlm",), (".codebooks", ".codes")),
    Unreadable("QuIP#", ("quip", "quip#", "quip_sharp"), (".Qidxs", ".SU", ".SV")),
    Unreadable("SpQR", ("spqr",), (".dense_weights", ".row_offsets", ".col_vals", ".in_perm")),
    Unreadable("HIGGS", ("higgs",), (".tables2", ".num_sms_packed"), _TRANSFORMERS),
    Unreadable("FP-Quant", ("fp_quant",), (".dqweight", "_hadamard_matrix")),
    Unreadable("quanto", ("quanto",), (".weight._data", ".weight._scale")),
    Unreadable("EXL2", ("exl2",), (".q_invperm", ".q_scale_max")),
    Unreadable("EXL3", ("exl3",), (".trellis", ".suh", ".svh")),
    Unreadable("SqueezeLLM", ("squeezellm",), (".lookup_table",)),
    Unreadable("Gemma's QAT form", ("gemma",), (".embedding_quantized",)),
    Unreadable("GGUF", ("gguf",), (), _GGUF),
)
_BY_ENDING = {ending: form for form in UNREADABLE for ending in form.endings}
_BY_METHOD = {method: form for form in UNREADABLE for method in form.methods}
_ENDINGS = tuple(_BY_ENDING)
_STATE = ".quant_state."
_GGUF_NAME = re.compile(r"blk\.\d+\.(?:attn|ffn)_")

_FORMATS: Mapping[str, tuple[str, ...]] = {
    "float-quantized": ("fp8",),
    "naive-quantized": ("fp8", "int-quantized"),
    "int-quantized": ("int-quantized",),
    "pack-quantized": ("pack-quantized",),
    "nvfp4-pack-quantized": ("nvfp4",),
    "mxfp4-pack-quantized": ("mxfp4",),
}
"""``format`` in configs of compressed-tensors → names of number forms."""

OF_MLX_LM = frozenset({"awq", "bitnet", "gptq", "mxfp4", "mxfp8"})
"""Values of ``quant_method`` that ``load_model`` of mlx-lm has a branch for."""


def method_of(config: Mapping[str, Any]) -> str | None:
    """Return the config's ``quant_method``; None for floats and for MLX's own form."""
    for entry in quantization_configs(config):
        method = entry.get("quant_method")
        if method is None and (entry.get("load_in_4bit") or entry.get("load_in_8bit")):
            return "bitsandbytes"
        return None if method is None else str(method)
    return None


def is_read(method: str | None) -> bool:
    """Whether mlx-lm or this package reads checkpoints with this ``quant_method``."""
    ours = {name for form in numbers.FORMS for name in form.methods}
    return method is None or method == DEQUANTIZED or method in OF_MLX_LM | ours


def check_unreadable(
    layout: Layout, config: Mapping[str, Any], row: Row | None
) -> Iterator[Finding]:
    """Yield the tensors of forms that nobody reads, or the ``quant_method`` of such a form.

    Args:
        layout: the checkpoint's layout.
        config: its config.
        row: the module's row; without one, integer weights are left to the module.
    """
    method = method_of(config)
    named = None if is_read(method) else _BY_METHOD.get(str(method))
    found = False
    for name in layout.tensors:
        form = _form_of(name)
        if form is not None:
            found = True
            # Forms share names: SINQ's tensors are HQQ's. The config is the better witness.
            title, remedy = (named.title, named.remedy) if named else (form.title, form.remedy)
            yield _finding(name, f"belongs to a {title} weight", remedy)
    if found:
        return
    if not is_read(method):
        title = f" ({named.title})" if named else ""
        yield _finding(
            "config.json",
            f"says quant_method {method!r}{title}, which neither mlx-lm nor this package reads",
            named.remedy if named else OTHER_RELEASE,
            "the method of a form that one of them reads, or none",
        )
        return
    yield from _contradictions(layout, method)
    yield from _other_format(layout, config, method)
    if row is not None and not row.keeps and method not in OF_MLX_LM:
        yield from _unexplained(layout)


def _form_of(name: str) -> Unreadable | None:
    if name.endswith(_ENDINGS):
        return next(form for ending, form in _BY_ENDING.items() if name.endswith(ending))
    if _STATE in name:
        return _BY_METHOD["bitsandbytes"]
    return _BY_METHOD["gguf"] if _GGUF_NAME.match(name) else None


def _contradictions(layout: Layout, method: str | None) -> Iterator[Finding]:
    """Yield weights in a form that the config's ``quant_method`` does not have."""
    if method in (None, DEQUANTIZED):
        return
    for found in layout.numbers.found:
        if method not in found.form.methods and not any(found.findings()):
            for name in found.weights:
                yield _finding(
                    name,
                    f"is {found.form.title}, and config.json says quant_method {method!r}",
                    f"correct quantization_config in config.json, or {AGAIN}",
                    "weights in the form that config.json names",
                )


def _other_format(
    layout: Layout, config: Mapping[str, Any], method: str | None
) -> Iterator[Finding]:
    """Yield weights of which none is in a form that the config declares."""
    found = [f for f in layout.numbers.found if f.weights]
    said = _declared(config, method)
    if said is None or not found:
        return
    words, names = said
    if names.isdisjoint(f.form.name for f in found):
        for one in found:
            for name in one.weights:
                yield _finding(
                    name,
                    f"is {one.form.title}, and config.json says {words}",
                    f"correct quantization_config in config.json, or {AGAIN}",
                    "weights in the form that config.json names",
                )


def _declared(config: Mapping[str, Any], method: str | None) -> tuple[str, frozenset[str]] | None:
    """Return the config's format in words and the names of its forms; None if it may be any."""
    entry = next(iter(quantization_configs(config)), {})
    if method == "compressed-tensors":
        groups = entry.get("config_groups")
        each = groups.values() if isinstance(groups, Mapping) else ()
        formats = [g.get("format") for g in each if isinstance(g, Mapping) and g.get("format")]
        formats = formats or [entry.get("format")]
        known = dict.fromkeys(f for f in formats if isinstance(f, str) and f in _FORMATS)
        if len(known) < len(set(map(str, formats))):
            return None
        names = frozenset(name for f in known for name in _FORMATS[f])
        return f"format {' and '.join(map(repr, known))}", names
    if method == "modelopt":
        settings = entry.get("quantization")
        algorithm = (settings if isinstance(settings, Mapping) else entry).get("quant_algo")
        if not isinstance(algorithm, str):
            return None
        for part, name in (("NVFP4", "nvfp4"), ("MXFP4", "mxfp4"), ("FP8", "fp8")):
            if part in algorithm:
                return f"quant_algo {algorithm!r}", frozenset({name})
    return None


def _unexplained(layout: Layout) -> Iterator[Finding]:
    """Yield matrices of integers that belong to no form."""
    explained = {*layout.numbers.weights, *layout.numbers.stray}
    for name, info in layout.weights.items():
        if info.dtype in FLOATS or len(info.shape) < 2 or name in explained:
            continue
        if not name.endswith((".weight", "_proj")) or is_packed_name(name):
            continue
        if f"{name.removesuffix('.weight')}.scales" in layout.tensors:
            continue  # MLX's own form.
        yield _finding(name, f"is {info.dtype}, as which no form of weights is known")


def _finding(
    name: str, found: str, remedy: str = OTHER_RELEASE, expected: str = _EXPECTED
) -> Finding:
    return Finding(
        name,
        found,
        expected,
        remedy=remedy,
        error=UnsupportedCheckpointError,
        rank=0,
        topic="form",
    )
