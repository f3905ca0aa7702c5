"""A GLM-4.5-shaped checkpoint of 256 experts, 8 per token, written tensor by tensor.

Routing is as even as random weights make it, or skewed: the router's correction bias, which such
releases have, follows Zipf's law. Expert weights are windows of one random pool, so a checkpoint
of gigabytes is written as fast as the disk takes it, and memory holds one tensor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

FORMS = ("bf16", "fp8", "int4", "mlx4")
BLOCK, GROUP, MLX_GROUP = 128, 128, 64
SKEW = 0.05
"""Bias per log of rank. Beside scores that spread by 0.2, a quarter of the experts get 0.63 of all
choices."""
POOL = 2**24
Tensor = tuple[str, tuple[int, ...], Callable[[], npt.NDArray[Any]]]
"""Stored dtype, shape, and what makes its bytes."""


@dataclass(frozen=True)
class Model:
    """What may be chosen about the checkpoint."""

    layers: int = 4
    hidden: int = 512
    intermediate: int = 256
    experts: int = 256
    chosen: int = 8
    vocab: int = 4096
    form: str = "fp8"
    skewed: bool = False

    @property
    def name(self) -> str:
        """Folder name of this model."""
        routing = "skewed" if self.skewed else "uniform"
        return (
            f"{self.form}-{routing}-{self.layers}x{self.experts}x{self.hidden}x{self.intermediate}"
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``[O, I]`` of each projection."""
        up = (self.intermediate, self.hidden)
        return {"gate_proj": up, "up_proj": up, "down_proj": up[::-1]}

    def config(self) -> dict[str, Any]:
        """The config.json."""
        config: dict[str, Any] = {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "attention_bias": False,
            "dtype": "bfloat16",
            "eos_token_id": self.vocab - 1,
            "first_k_dense_replace": 0,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": self.intermediate,
            "n_group": 1,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": self.hidden // 64,
            "num_experts_per_tok": self.chosen,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "use_qk_norm": False,
            "vocab_size": self.vocab,
        }
        if self.form == "mlx4":
            quantization: dict[str, Any] = {"group_size": MLX_GROUP, "bits": 4, "mode": "affine"}
            config["quantization"] = config["quantization_config"] = quantization
        elif self.form != "bf16":
            from _forms import FORMS as STORED

            config["quantization_config"] = dict(STORED[self.form].config)
            if self.form == "int4":
                config["quantization_config"]["ignore"] = ["lm_head", "re:.*self_attn.*"]
                config["quantization_config"]["ignore"] += ["re:.*shared_experts.*"]
        return config


def made(model: Model, cache: Path) -> Path:
    """Return the model's folder in ``cache``, written now if it is not there."""
    folder = cache / model.name
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(model, folder)
    return folder


def write(model: Model, folder: Path) -> None:
    """Write the checkpoint, the config last."""
    draw = np.random.default_rng(0)
    pool = draw.standard_normal(POOL, dtype=np.float32)
    _save(folder / "model-rest.safetensors", dict(_rest(model, draw)))
    for layer in range(model.layers):
        make = _stacked if model.form == "mlx4" else _apart
        _save(folder / f"model-{layer:05}.safetensors", dict(make(model, layer, pool, draw)))
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2))


def _rest(model: Model, draw: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
    """Everything but routed experts, as bfloat16; the router's scores have a spread of 0.2."""

    def matrix(rows: int, columns: int, spread: float | None = None) -> Tensor:
        scale = columns**-0.5 if spread is None else spread
        values = draw.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)
        return "BF16", (rows, columns), partial(_bfloat16, values)

    def linear(module: str, rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
        if model.form != "mlx4":
            yield f"{module}.weight", matrix(rows, columns)
            return
        for kind, array in _packed(matrix(rows, columns)[2]()).items():
            stored = "U32" if kind == "weight" else "BF16"
            yield f"{module}.{kind}", (stored, array.shape, array.copy)

    ones = "BF16", (model.hidden,), partial(_bfloat16, np.ones(model.hidden, np.float32))
    hidden, heads = model.hidden, model.hidden // 64
    yield from linear("model.embed_tokens", model.vocab, hidden)
    yield from linear("lm_head", model.vocab, hidden)
    yield "model.norm.weight", ones
    for layer in range(model.layers):
        path = f"model.layers.{layer}"
        yield f"{path}.input_layernorm.weight", ones
        yield f"{path}.post_attention_layernorm.weight", ones
        for name, out in (("q_proj", heads), ("k_proj", 2), ("v_proj", 2)):
            yield from linear(f"{path}.self_attn.{name}", out * 64, hidden)
        yield from linear(f"{path}.self_attn.o_proj", hidden, heads * 64)
        for name, (rows, columns) in model.shapes.items():
            yield from linear(f"{path}.mlp.shared_experts.{name}", rows, columns)
        yield f"{path}.mlp.gate.weight", matrix(model.experts, hidden)
        bias = np.zeros(model.experts, np.float32)
        if model.skewed:
            bias -= SKEW * draw.permutation(np.log(np.arange(1, model.experts + 1)))
        yield f"{path}.mlp.gate.e_score_correction_bias", ("F32", bias.shape, bias.copy)


def _apart(
    model: Model, layer: int, pool: npt.NDArray[np.float32], draw: np.random.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Each expert's tensors by themselves, as releases have them."""
    for expert in range(model.experts):
        for name, shape in model.shapes.items():
            module = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
            rows, columns = shape
            at = int(draw.integers(POOL - rows * columns))
            window = pool[at : at + rows * columns]
            if model.form == "bf16":
                yield f"{module}.weight", ("BF16", shape, partial(_weights, window, shape))
            elif model.form == "fp8":
                scales = np.full((rows // BLOCK, columns // BLOCK), 2**-6, np.float32)
                yield f"{module}.weight", ("F8_E4M3", shape, partial(_e4m3, window, shape))
                yield (
                    f"{module}.weight_scale_inv",
                    ("BF16", scales.shape, partial(_bfloat16, scales)),
                )
            else:
                bits = window.view(np.int32)[: rows * columns // 8]
                scales = np.full((rows, columns // GROUP), columns**-0.5 / 4, np.float32)
                sizes = np.array(shape, np.int64)
                yield f"{module}.weight_packed", ("I32", (rows, columns // 8), bits.copy)
                yield f"{module}.weight_scale", ("BF16", scales.shape, partial(_bfloat16, scales))
                yield f"{module}.weight_shape", ("I64", (2,), sizes.copy)


def _stacked(
    model: Model, layer: int, pool: npt.NDArray[np.float32], draw: np.random.Generator
) -> Iterator[tuple[str, Tensor]]:
    """An MLX folder: each projection of all experts in one tensor, in 4 bits."""
    for name, (rows, columns) in model.shapes.items():
        at = int(draw.integers(POOL - model.experts - rows * columns))
        found: dict[str, list[Any]] = {}
        for expert in range(model.experts):
            begin = at + expert
            window = pool[begin : begin + rows * columns]
            for kind, array in _packed(_weights(window, (rows, columns))).items():
                found.setdefault(kind, []).append(array)
        for kind, arrays in found.items():
            stack = np.stack(arrays)
            stored = "U32" if kind == "weight" else "BF16"
            path = f"model.layers.{layer}.mlp.switch_mlp.{name}.{kind}"
            yield path, (stored, stack.shape, stack.copy)


def _packed(words: npt.NDArray[np.uint16]) -> dict[str, Any]:
    """``[O, I]`` in bfloat16, quantised by MLX: its tensors as words."""
    import mlx.core as mx

    values = mx.array(words).view(mx.bfloat16)
    parts = mx.quantize(values, group_size=MLX_GROUP, bits=4)
    return {
        kind: np.array(part if kind == "weight" else part.view(mx.uint16))
        for kind, part in zip(("weight", "scales", "biases"), parts, strict=True)
    }


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Words of float32 values, cut to bfloat16."""
    words: npt.NDArray[np.uint16] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return words


def _weights(window: npt.NDArray[np.float32], shape: tuple[int, int]) -> npt.NDArray[np.uint16]:
    """Words of a matrix that keeps the size of what it multiplies."""
    return _bfloat16(window.reshape(shape) * np.float32(shape[1] ** -0.5))


def _e4m3(window: npt.NDArray[np.float32], shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """E4M3 bytes of such a matrix times 64."""
    import mlx.core as mx

    values = mx.array(window.reshape(shape) * np.float32(64 * shape[1] ** -0.5))
    found: npt.NDArray[np.uint8] = np.array(mx.to_fp8(values))
    return found


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4, "U32": 4, "I64": 8}
    offset = 0
    for name, (dtype, shape, _) in tensors.items():
        end = offset + int(np.prod(shape)) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        for _, (_, _, make) in tensors.items():
            _write_array(file, make())


def _write_array(file: BinaryIO, array: npt.NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(array).data)
