"""Settle ``quantization_config``, by which ``load_model`` quantises its modules.

Weights that the plan dequantises must not be declared as quantised. Weights that are quantised
while loading must be declared. A checkpoint in a quantised form that is not dequantised cannot
be quantised again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.checkpoint.operations import MlxFormat
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.packing import Packing

DEQUANTIZED = "dequantized"
"""The ``quant_method`` of configs whose weights were dequantised; mlx-lm has no branch for
it."""


def sign_of_quantization(
    config: Mapping[str, Any], layout: Layout, *, extern: bool = False
) -> str | None:
    """Return the evidence that a checkpoint is in a quantised form that stays, or None.

    Args:
        config: the checkpoint's config.
        layout: the checkpoint's layout.
        extern: whether the folder has an ``hf_quant_config.json``.
    """
    numbers = layout.numbers
    method = next((c.get("quant_method", "unnamed") for c in quantization_configs(config)), None)
    if config.get("quantization") is not None:
        return "config.json has `quantization`"
    known = {None, DEQUANTIZED, "fp8"} | (numbers.methods if numbers.weights else frozenset())
    if method not in known:
        return f"config.json says quant_method {method!r}"
    if not numbers.weights and extern:
        return "it has an hf_quant_config.json"
    ours = numbers.tensors
    packed = [n for n in layout.tensors if n.endswith((".scales", ".weight_packed"))]
    if found := [n for n in packed if n not in ours]:
        return f"it holds {fold(found)}"
    return None


def weights_that_stay(layout: Layout) -> list[str]:
    """Return the weights in numbers that MLX or the module holds as they are.

    A form with findings is one that the module keeps; any other has been refused.
    """
    return [
        name
        for found in layout.numbers.found
        for kept in [next(found.findings(), None) is not None]
        for name in found.weights
        if kept or found.dequantize(name).held is not None
    ]


def commonest_held(builds: Iterable[Build]) -> MlxFormat | None:
    """Return the format that most builds hold; None if none holds any."""
    count = Counter(build.held for build in builds if build.held is not None)
    return count.most_common(1)[0][0] if count else None


def announce(config: dict[str, Any], packing: Packing) -> None:
    """Make ``load_model`` quantise its modules and return a config that declares it."""
    config["quantization"] = dict(packing.config)
    # One dict under both keys, as in mlx-lm. Modules in a format of their own are added once
    # the model exists.
    config["quantization_config"] = config["quantization"]
    if isinstance(text := config.get("text_config"), dict):
        text.pop("quantization_config", None)
        text.pop("quantization", None)


def mark_dequantized(config: dict[str, Any]) -> None:
    """Make ``load_model`` treat the weights as floats.

    ``quantization_config`` is replaced, not deleted, since mlx-lm would then use the one in
    ``text_config`` or ``hf_quant_config.json``.
    """
    text = config.get("text_config")
    for section in (config, text):
        if isinstance(section, dict) and (section is config or "quantization_config" in section):
            was = section.get("quantization_config")
            block = was.get("weight_block_size") if isinstance(was, dict) else None
            section["quantization_config"] = {
                "quant_method": DEQUANTIZED,
                **({"weight_block_size": block} if block is not None else {}),
            }


def spared(config: Mapping[str, Any], setting: str) -> tuple[str, ...]:
    """Return the entries of ``modules_to_not_convert`` that a setting respects.

    Eight bits lose as little as the checkpoint's own FP8, so only settings of fewer bits
    respect the list.
    """
    if setting not in ("6bit", "4bit"):
        return ()
    return tuple(
        entry
        for found in quantization_configs(config)
        if isinstance(entries := found.get("modules_to_not_convert"), list)
        for entry in entries
        if isinstance(entry, str)
    )


def spared_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    stored: Collection[str],
    setting: str,
) -> set[str]:
    """Return the names of tensors whose modules the setting does not quantise.

    An entry of the list applies to the module and to all modules below it.

    Args:
        config: the checkpoint's config.
        tensors: the checkpoint's tensors.
        stored: names of weights in a stored number form, to which the list does not apply.
        setting: a key of ``QUANTIZE_SETTINGS``.
    """
    entries = spared(config, setting)
    return {
        name
        for name in (tensors if entries else ())
        if name not in stored and is_listed(name.removesuffix(".weight"), entries)
    }


def is_listed(module: str, entries: Collection[str]) -> bool:
    """Whether an entry of ``modules_to_not_convert`` is the module, a parent or its last names."""
    return any(
        module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
        for entry in entries
    )
