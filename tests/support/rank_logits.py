"""A rank that computes tiny checkpoints of several families with the others, and by itself.

    python -m support.rank_logits FOLDER CHECKPOINT…    with MLX_RANK and MLX_HOSTFILE

A checkpoint is a folder, or a family and a form: ``qwen3_moe, block FP8``. The rank that computes
with the others reads its share only.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import vllm_moe_compat
from vllm_moe_compat import envs
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.probes.recipes import TOKENS, families
from vllm_moe_compat.probes.variants import write
from vllm_moe_compat.ranks.share import Share


def logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array([TOKENS]))[0])


def size(model: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def cached(model: Any) -> list[int]:
    """Return the bytes of each layer's cache: of one token, or of a state."""
    return [
        layer.token_bytes
        if isinstance(layer, AttentionLayer)
        else sum(math.prod(shape) for shape in layer.shapes)
        for layer in describe(model)
    ]


def place_of(folder: Path, name: str, rank: int) -> Path:
    """Return the checkpoint's folder, written if it is not there."""
    if name.startswith("/"):
        return Path(name)
    base, _, form = name.partition(", ")
    family, place = families()[base], folder / name.replace(" ", "_") / str(rank)
    place.mkdir(parents=True)
    row = TRANSFORMS_BY_MODULE[f"mlx_lm.models.{family.module}"]
    assert write(place, family, row, form or "release") is not None
    return place


def compare(folder: Path, name: str, group: mx.distributed.Group) -> dict[str, Any]:
    """Return how far the ranks' logits are from the whole model's, and this rank's share."""
    place = place_of(folder, name, group.rank())
    with envs.override({envs.EXPERT_CACHE.name: "off"}):
        model, _ = load_model(place)
    wanted, whole, caches = logits(model), size(model), cached(model)
    share = Share(place, group)
    with loading_with(arrange=share):
        model, _ = load_model(place)
    found = logits(model)
    return {
        "distance": float(np.abs(found - wanted).max() / np.abs(wanted).max()),
        "same tokens": bool((found.argmax(-1) == wanted.argmax(-1)).all()),
        "share": size(model) / whole,
        "whole": share.cutting.whole,
        "caches": [mine / one for mine, one in zip(cached(model), caches, strict=True)],
    }


def main(folder: str, *names: str) -> None:
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    with vllm_moe_compat.applied(), loading_with(dtype="float32"):
        found = {name: compare(Path(folder), name, group) for name in names}
    Path(folder, f"{group.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
