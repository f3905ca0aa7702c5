"""Adapters as mlx-lm's training writes them, with random values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

LAYERS = 2
LORA: dict[str, Any] = {"rank": 4, "scale": 2.0, "dropout": 0.0}


def write_adapter(model: Any, folder: Path, keys: Sequence[str] | None = None) -> Path:
    """Write a random adapter for the model, which gets the adapter's layers.

    Args:
        model: whose layers it changes.
        folder: a new one.
        keys: paths of modules in a layer; None for all, experts too.
    """
    folder.mkdir()
    model.freeze()
    lora = LORA if keys is None else LORA | {"keys": list(keys)}
    linear_to_lora_layers(model, LAYERS, lora)
    mx.random.seed(3)
    trained = {
        name: mx.random.normal(array.shape, scale=0.1)
        for name, array in tree_flatten(model.trainable_parameters())
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
