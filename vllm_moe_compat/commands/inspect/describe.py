"""Describe a checkpoint's files, experts, number forms and extra tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_moe_compat.checkpoint.config import layer_count, quantization_configs, sections
from vllm_moe_compat.checkpoint.experts import ExpertBlock
from vllm_moe_compat.checkpoint.extras import DEFAULT_EXTRAS
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import fold_numbers, layer_of
from vllm_moe_compat.commands.inspect.model import Experts, Extra, Files, LayerRun, Quantization
from vllm_moe_compat.commands.inspect.problems import clean
from vllm_moe_compat.plan.estimate import nbytes
from vllm_moe_compat.plan.planner import Plan

_MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_TOWERS = ("vision_config", "audio_config", "vit_config")
_SENSES = re.compile(r"vis(?:ion|ual)|vit_|audio|projector|patch_merge")


def files(tensors: Mapping[str, TensorInfo], shards: int) -> Files:
    """Count shards, tensors, bytes and dtypes."""
    dtypes = Counter(info.dtype for info in tensors.values())
    return Files(shards, len(tensors), sum(map(nbytes, tensors.values())), dict(dtypes))


def _held(block: ExpertBlock, layout: Layout) -> tuple[str, int, tuple[str, ...]]:
    """Return form, number and dtypes of one layer's experts."""
    names = [name for name in block.names() if name in layout.weights]
    count = len({e for experts in block.per_expert.values() for e in experts})
    for name in (*block.combined.values(), *block.stacked.values()):
        shape = layout.weights[name].shape
        count = max(count, shape[0] if len(shape) > 1 else 0)
    dtypes = Counter(layout.weights[name].dtype for name in names)
    form = " and ".join(block.layouts) or "unknown form"
    return form, count, tuple(sorted(dtypes))


def experts(layout: Layout) -> Experts | None:
    """Describe the routed experts, equal layers grouped; None for a dense model."""
    if not layout.experts:
        return None
    held: dict[str, dict[int, tuple[str, int, tuple[str, ...]]]] = {}
    odd: list[LayerRun] = []
    for block in layout.experts:
        if layer := layer_of(block.path):
            held.setdefault(layer.prefix, {}).setdefault(layer.number, _held(block, layout))
        else:
            form, count, dtypes = _held(block, layout)
            odd.append(LayerRun(clean(block.path), form, count, list(dtypes)))
    for prefix, number in _layers(layout.tensors):
        if prefix in held:
            held[prefix].setdefault(number, ("dense", 0, ()))
    runs = [
        LayerRun(clean(f"{prefix}{fold_numbers(numbers)}"), form, count, list(dtypes))
        for prefix, layers in held.items()
        for (form, count, dtypes), numbers in _alike(layers)
    ]
    blocks = layout.experts
    return Experts(
        forms=list(dict.fromkeys(form for block in blocks for form in block.layouts)),
        expected=layout.num_experts,
        projections=[clean(s, 60) for s in sorted({s for b in blocks for s in b.spelling})][:16],
        runs=[*runs, *odd],
    )


def _layers(names: Iterable[str]) -> set[tuple[str, int]]:
    return {(layer.prefix, layer.number) for name in names if (layer := layer_of(name))}


def _alike(
    layers: Mapping[int, tuple[str, int, tuple[str, ...]]],
) -> list[tuple[tuple[str, int, tuple[str, ...]], list[int]]]:
    """Group equal layers, in the order of each group's first layer."""
    groups: dict[tuple[str, int, tuple[str, ...]], list[int]] = {}
    for number in sorted(layers):
        groups.setdefault(layers[number], []).append(number)
    return list(groups.items())


def quantization(layout: Layout, config: Mapping[str, Any], extern: Any) -> Quantization:
    """Describe the stored form of the weights.

    Args:
        layout: the checkpoint's layout.
        config: its config.json.
        extern: the content of its hf_quant_config.json, if it has one.
    """
    method = next((c.get("quant_method") for c in quantization_configs(config)), None)
    if method is None and isinstance(extern, dict):
        method = "modelopt"
    method = None if method is None else clean(method, 60)
    tensors = layout.tensors
    if details := [form for form in layout.numbers.details if form.weights]:
        return Quantization(
            " and ".join(form.words for form in details),
            method,
            sum(form.weights for form in details),
            [list(block) for form in details for block in form.blocks],
            sorted({dtype for form in details for dtype in form.scale_dtypes}),
            len(layout.numbers.unused),
        )
    packed = [n for n in tensors if n.endswith((".scales", "_packed", "_blocks", ".qweight"))]
    own = config.get("quantization")
    if isinstance(own, dict):
        mode = clean(own.get("mode", "affine"), 20)
        bits, group = clean(own.get("bits"), 20), clean(own.get("group_size"), 20)
        return Quantization(f"MLX {mode} {bits}-bit g{group}", method, len(packed))
    if packed or method is not None:
        return Quantization(f"packed ({method or 'unnamed'})", method, len(packed))
    dtypes = Counter(i.dtype for i in tensors.values() if len(i.shape) > 1)
    return Quantization(dtypes.most_common(1)[0][0] if dtypes else "empty", method)


def extras(
    layout: Layout, everything: Mapping[str, TensorInfo], config: Mapping[str, Any] | None
) -> list[Extra]:
    """Describe the tensors beside the language model and compare them with the config."""
    names = set(layout.ignored)
    loaded = DEFAULT_EXTRAS.of(config or {}).select(layout.tensors)
    kinds: dict[str, list[str]] = {"mtp": [], "vision": [], "surplus experts": []}
    layers = layer_count(config) if config else None
    for name in everything:
        if name in names or name in loaded:
            kinds[_kind(name, layers)].append(name)
    found = []
    for kind, members in kinds.items():
        says = None if config is None or kind == "surplus experts" else _says(kind, config)
        if members or says:
            found.append(
                Extra(
                    kind,
                    len(members),
                    sum(nbytes(everything[name]) for name in members),
                    sum(name in loaded for name in members),
                    says,
                    None if says is None else says == bool(members),
                )
            )
    return found


def _kind(name: str, layers: int | None) -> str:
    if "mtp" in name.lower():
        return "mtp"
    layer = layer_of(name)
    beyond = layer is not None and layers is not None and layer.number >= layers
    if layer is not None and beyond and not _SENSES.search(layer.prefix):
        return "mtp"
    return "surplus experts" if ".experts." in name and not _SENSES.search(name) else "vision"


def _says(kind: str, config: Mapping[str, Any]) -> bool:
    if kind == "mtp":
        return any(
            isinstance(section.get(key), int) and section[key] > 0
            for section in sections(config)
            for key in _MTP_KEYS
        )
    return any(isinstance(config.get(key), dict) for key in _TOWERS)


def dropped_by_us(plan: Plan, layout: Layout) -> list[str]:
    """Return the names that the plan takes out because upstream does not."""
    static = set(layout.numbers.unused)
    return [name for name in plan.drops if name not in static]
