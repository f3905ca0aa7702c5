"""``quantization_config``: what ``load_model`` is told of the weights that it gets.

Weights that the plan dequantises must not be taken for quantised ones; weights that are
quantised while loading must be announced; and a checkpoint that is quantised in a form that
is not dequantised here cannot be quantised again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.plan.packing import Requantize

DEQUANTIZED = "dequantized"
"""The ``quant_method`` of configs whose weights were dequantised: no branch of mlx-lm
answers to it."""


def already_quantized(
    config: Mapping[str, Any], layout: Layout, *, extern: bool = False
) -> str | None:
    """Say by what a checkpoint shows that it is quantised in a form that stays; None if not.

    Args:
        config: the checkpoint's.
        layout: its tensors.
        extern: whether it has an ``hf_quant_config.json``.
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
    if found := [n for n in layout.tensors if n.endswith((".scales", ".weight_packed"))]:
        return f"it holds {fold(found)}"
    return None


def announce(config: dict[str, Any], packing: Requantize) -> None:
    """Have ``load_model`` quantise its modules, and return a config that says so."""
    config["quantization"] = dict(packing.config)
    # One dict under both keys, as in mlx-lm: modules in a format of their own are added
    # when the model is there.
    config["quantization_config"] = config["quantization"]
    if isinstance(text := config.get("text_config"), dict):
        text.pop("quantization_config", None)
        text.pop("quantization", None)


def mark_dequantized(config: dict[str, Any]) -> None:
    """Have ``load_model`` treat the weights as floats.

    ``quantization_config`` is replaced, never deleted: without one, mlx-lm looks for the
    next in ``text_config`` and in ``hf_quant_config.json``.
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
    """Return the ``modules_to_not_convert`` that this setting leaves as they are.

    Eight bits cost as little as the checkpoint's own FP8; fewer bits cost more than the
    author of the list had in mind.
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
    """Return the tensors whose modules the setting leaves as they are.

    A module that has no entry of its own in the list is spared with its parent.

    Args:
        config: the checkpoint's.
        tensors: of the checkpoint.
        stored: names of the weights in a stored number form: those were converted.
        setting: a key of ``QUANTIZE_SETTINGS``.
    """
    entries = spared(config, setting)
    return {
        name
        for name in (tensors if entries else ())
        if name not in stored and is_listed(name.removesuffix(".weight"), entries)
    }


def is_listed(module: str, entries: Collection[str]) -> bool:
    """Whether an entry of ``modules_to_not_convert`` names the module, its parent or its end."""
    return any(
        module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
        for entry in entries
    )
