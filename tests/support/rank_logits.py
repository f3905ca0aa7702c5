"""A rank that computes tiny checkpoints of several families with the others, and by itself.

python -m support.rank_logits FOLDER FAMILY…    with MLX_RANK and MLX_HOSTFILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import vllm_moe_compat
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.probes.recipes import TOKENS, families
from vllm_moe_compat.probes.variants import write
from vllm_moe_compat.ranks.shard import shard


def logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array([TOKENS]))[0])


def size(model: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def compare(folder: Path, name: str, group: mx.distributed.Group) -> dict[str, Any]:
    """Return how far the ranks' logits are from the whole model's, and this rank's share."""
    family = families()[name]
    place = folder / name.replace(" ", "_") / str(group.rank())
    place.mkdir(parents=True)
    write(place, family, TRANSFORMS_BY_MODULE[f"mlx_lm.models.{family.module}"], "release")
    model, _ = load_model(place)
    model.set_dtype(mx.float32)
    wanted, whole = logits(model), size(model)
    try:
        cutting = shard(model, group)
    except UnsupportedServingError as error:
        return {"refused": str(error)}
    found = logits(model)
    return {
        "distance": float(np.abs(found - wanted).max() / np.abs(wanted).max()),
        "same tokens": bool((found.argmax(-1) == wanted.argmax(-1)).all()),
        "share": size(model) / whole,
        "whole": cutting.whole,
    }


def main(folder: str, *names: str) -> None:
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    with vllm_moe_compat.applied(), loading_with(dtype="float32"):
        found = {name: compare(Path(folder), name, group) for name in names}
    Path(folder, f"{group.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
