"""Checkpoints written down as JSON: what a file holds, or what stands in its place.

A case of the corpus is ``{"about", "exit", "finding", "over", "files"}``. Files are put
over the good ``checkpoint()`` where ``over`` says so: null takes one away, ``merge`` and
``map`` change keys of config and index, ``tensors`` changes the shard's. Else a file is one
of ``text``, ``json``, ``base64``, ``shard`` (a header, and so many bytes of data after it),
``header`` (raw text of a header), ``repeat`` (a text and a count), ``link``, ``pipe``,
``folder`` and ``size`` (a file of zeros, all of it a hole).
"""

from __future__ import annotations

import base64
import json
import os
import struct
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).resolve().parent.parent / "commands" / "inspect" / "corpus"


def case_files(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the files of a case of the corpus."""
    if not case.get("over"):
        return case["files"]
    files = checkpoint()
    for name, what in case["files"].items():
        match what:
            case None:
                del files[name]
            case {"merge": changes}:
                _merge(files[name]["json"], changes)
            case {"map": changes}:
                _merge(files[name]["json"]["weight_map"], changes)
            case {"tensors": changes}:
                specs = {n: (t["dtype"], t["shape"]) for n, t in files[name]["shard"].items()}
                header, data = tensors(_merge(specs, changes))
                files[name] = {"shard": header, "data": data}
            case _:
                files[name] = what
    return files


def _merge(into: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    into.update(changes)
    for key, value in changes.items():
        if value is None:
            del into[key]
    return into


def write(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Make the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, what in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, what)
    return folder


def _write(path: Path, what: dict[str, Any]) -> None:
    match what:
        case {"text": text}:
            path.write_text(text, encoding="utf-8")
        case {"json": value}:
            path.write_text(json.dumps(value))
        case {"base64": text}:
            path.write_bytes(base64.b64decode(text))
        case {"shard": header, "data": data}:
            shard(path, json.dumps(header).encode(), data)
        case {"header": text, "data": data}:
            shard(path, text.encode("utf-8", "surrogateescape"), data)
        case {"repeat": [text, count]}:
            path.write_text(text * count)
        case {"link": target}:
            path.symlink_to(target)
        case {"pipe": True}:
            os.mkfifo(path)
        case {"folder": True}:
            path.mkdir()
        case {"size": size}:
            with path.open("wb") as file:
                file.truncate(size)
        case _:
            raise ValueError(f"{path.name}: {what} says nothing")


def shard(path: Path, header: bytes, data: int) -> None:
    """Write a safetensors file whose data are a hole."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + data)


def tensors(specs: dict[str, tuple[str, list[int]]]) -> tuple[dict[str, Any], int]:
    """Return the header of tensors given by dtype and shape, and the bytes of their data."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in specs.items():
        start = end
        end += {"F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1) * _count(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header, end


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def checkpoint(
    experts: int = 4, layers: int = 2, hidden: int = 64, inner: int = 32
) -> dict[str, dict[str, Any]]:
    """Return a small Qwen3-MoE checkpoint in block FP8, one tensor per expert."""
    specs: dict[str, tuple[str, list[int]]] = {}

    def fp8(name: str, rows: int, columns: int) -> None:
        specs[f"{name}.weight"] = ("F8_E4M3", [rows, columns])
        specs[f"{name}.weight_scale_inv"] = ("BF16", [-(-rows // 32), -(-columns // 32)])

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for part in "qkvo":
            fp8(f"{prefix}.self_attn.{part}_proj", hidden, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs[f"{prefix}.{norm}.weight"] = ("BF16", [hidden])
        specs[f"{prefix}.mlp.gate.weight"] = ("BF16", [experts, hidden])
        for expert in range(experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                sides = (hidden, inner) if part == "down_proj" else (inner, hidden)
                fp8(f"{prefix}.mlp.experts.{expert}.{part}", *sides)
    for name in ("model.embed_tokens", "lm_head"):
        specs[f"{name}.weight"] = ("BF16", [96, hidden])
    specs["model.norm.weight"] = ("BF16", [hidden])
    header, data = tensors(specs)
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": inner,
        "vocab_size": 96,
        "rope_theta": 10000.0,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    }
    index = dict.fromkeys(header, "model.safetensors")
    return {
        "config.json": {"json": config},
        "model.safetensors": {"shard": header, "data": data},
        "model.safetensors.index.json": {"json": {"metadata": {}, "weight_map": index}},
    }
