"""Loading tiny checkpoints through the real mlx-lm, and comparing the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten

from support.checkpoints import Checkpoint

TOKENS = list(range(3, 40))


def load(path: Path) -> Any:
    """Return the model; mlx-lm's own strict load."""
    model, _ = mlx_lm.utils.load_model(path)
    return model


def distance(model: Any, checkpoint: Checkpoint) -> float:
    """Return max|d| / max|ref| of the logits, in float32."""
    model.set_dtype(mx.float32)
    found = np.array(model(mx.array([TOKENS]))[0])
    wanted = checkpoint.logits(TOKENS).numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def parameters(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def same_bits(left: Mapping[str, mx.array], right: Mapping[str, mx.array]) -> bool:
    """Whether both hold the same names, dtypes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and mx.array_equal(_bytes(left[name]), _bytes(right[name])).item()
        for name in left
    )


def _bytes(array: mx.array) -> mx.array:
    return array.reshape(-1).view(mx.uint8)


def new_model(config: dict[str, Any]) -> Any:
    """Return an instance of the class that mlx-lm picks, weights still random."""
    model_class, args_class = mlx_lm.utils._get_classes(config)
    return model_class(args_class.from_dict(config))


def read(path: Path) -> dict[str, mx.array]:
    """Return the weights as mlx-lm's loader reads them."""
    weights: dict[str, mx.array] = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights.update(mx.load(str(file)))
    return weights
