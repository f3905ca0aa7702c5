"""How quantised releases name their scales and describe themselves."""

from __future__ import annotations

from typing import Any

import torch


def scales(scheme: str, name: str, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is stored beside a quantised tensor."""
    base = name.removesuffix(".weight")
    if scheme == "block":
        return {f"{name}_scale_inv": scale}
    if scheme == "tensor":
        return {f"{name}_scale_inv": scale, f"{base}.activation_scale": torch.tensor(0.5)}
    if scheme == "channel":
        return {f"{base}.weight_scale": scale}
    if scheme == "modelopt":
        return {f"{base}.weight_scale": scale, f"{base}.input_scale": torch.tensor(0.5)}
    raise ValueError(scheme)


def config(
    scheme: str, block: tuple[int, int] | None, scale: torch.dtype, kept: list[str]
) -> dict[str, Any]:
    """Return ``quantization_config``; ``kept`` are the modules not converted."""
    if scheme in ("block", "tensor"):
        described: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic" if block else "static",
            "weight_block_size": list(block) if block else None,
            "modules_to_not_convert": kept,
        }
        if scale is torch.float8_e8m0fnu:
            described["scale_fmt"] = "ue8m0"
        return described
    if scheme == "channel":
        shared = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
        group = {
            "format": "float-quantized",
            "targets": ["Linear"],
            "weights": shared | {"strategy": "channel", "dynamic": False, "observer": "minmax"},
            "input_activations": shared | {"strategy": "token", "dynamic": True, "observer": None},
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": kept,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": "0.12.2",
        }
    assert scheme == "modelopt"
    return {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "ignore": kept,
    }


def files(scheme: str, kept: list[str]) -> dict[str, Any]:
    """Return what is written beside ``config.json``."""
    if scheme != "modelopt":
        return {}
    return {
        "hf_quant_config.json": {
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": None,
                "exclude_modules": kept,
            },
        }
    }
