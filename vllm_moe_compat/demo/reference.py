"""The oracle: the checkpoint's model in transformers, without this package's loader.

A few lines of torch, which share nothing with the code under test, dequantise the weights.
(transformers can read FP8 itself, but derives the block from the shape of the scale grid,
which is wrong where a dimension does not divide by 128.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_moe_compat.demo.prediction_head import new_head
from vllm_moe_compat.errors import SettingError

BLOCK = 128
PREFIX = "model.language_model."


def load_reference(path: str | Path, dtype: str = "float32") -> Any:
    """Return transformers' model with the checkpoint's weights, ready to generate.

    Products of value and scale are formed in float32 and rounded to ``dtype``,
    ``"float32"`` or ``"bfloat16"``, in which the model computes.
    """
    import torch

    tensors, config = _read(Path(path))
    return reference_model(tensors, config, getattr(torch, _checked(dtype)))


def load_reference_head(path: str | Path, dtype: str = "float32") -> Any:
    """Return the checkpoint's prediction head, for ``prediction_head.draft_logits``."""
    import torch

    tensors, config = _read(Path(path))
    return reference_head(tensors, config, getattr(torch, _checked(dtype)))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors under their published names, and ``text_config``."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(shard)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return tensors, config["text_config"]


def reference_model(tensors: dict[str, Any], text_config: dict[str, Any], dtype: Any) -> Any:
    """Build the model from the checkpoint's tensors under their published names."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(**(text_config | {"dtype": str(dtype).removeprefix("torch.")}))
    model = Qwen3_5MoeForCausalLM(config).to(dtype)
    names = {PREFIX: "model.", "lm_head.": "lm_head."}
    state = _combine_experts(_dequantize(tensors, names, dtype), config.num_experts)
    model.load_state_dict(state, strict=True)
    return model.eval()


def reference_head(tensors: dict[str, Any], text_config: dict[str, Any], dtype: Any) -> Any:
    """Build the prediction head from the checkpoint's tensors under their published names."""
    from transformers import Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(**(text_config | {"dtype": str(dtype).removeprefix("torch.")}))
    head = new_head(config).to(dtype)
    state = _combine_experts(_dequantize(tensors, {"mtp.": ""}, dtype), config.num_experts)
    head.load_state_dict(state, strict=True)
    return head.eval()


def _checked(dtype: str) -> str:
    if dtype not in ("float32", "bfloat16"):
        raise SettingError(f"dtype={dtype!r} is not supported; use 'float32' or 'bfloat16'.")
    return dtype


def _dequantize(tensors: dict[str, Any], names: dict[str, str], dtype: Any) -> dict[str, Any]:
    """Return the tensors whose prefix is in ``names``, under its replacement, as ``dtype``."""
    state = {}
    for name, value in tensors.items():
        prefix = next((p for p in names if name.startswith(p)), None)
        if prefix is None or name.endswith("_scale_inv"):
            continue
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None:
            rows, columns = value.shape
            grid = scale.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            value = value.float() * grid[:rows, :columns]
        state[names[prefix] + name.removeprefix(prefix)] = value.to(dtype)
    return state


def _combine_experts(state: dict[str, Any], experts: int) -> dict[str, Any]:
    """Combine each layer's per-expert matrices into ``[E, 2I, H]`` and ``[E, H, I]``."""
    import torch

    mark = ".mlp.experts."
    roots = {name.split(mark)[0] + mark for name in state if mark in name}
    combined = {name: value for name, value in state.items() if mark not in name}
    for root in roots:
        gate, up, down = (
            torch.stack([state[f"{root}{e}.{name}_proj.weight"] for e in range(experts)])
            for name in ("gate", "up", "down")
        )
        combined[f"{root}gate_up_proj"] = torch.cat([gate, up], dim=1)
        combined[f"{root}down_proj"] = down
    return combined
