"""transformers' seeded model of a family with other settings, saved, and its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import torch
import transformers

import vllm_moe_compat
from parity.families import FAMILIES
from parity.reference import new_config


class Oracle:
    """A random float32 model of transformers in a folder of its own."""

    def __init__(self, folder: Path, name: str, **settings: Any) -> None:
        """Save the family ``name`` of ``tests/parity`` with ``settings`` changed."""
        family = FAMILIES[name]
        config = new_config(replace(family, kwargs=family.kwargs | settings))
        torch.manual_seed(0)
        model_class = getattr(transformers, family.classes[1])
        model = model_class._from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for key, values in model.named_parameters():
                # Large enough that a key which should not be seen shows.
                mean = float(values.ndim == 1 and "norm" in key)
                values.normal_(mean, 0.15 if values.ndim > 1 else 0.05)
        model.save_pretrained(folder)
        self.folder, self.model = folder, model

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits ``[T, V]`` of a sequence."""
        with torch.no_grad():
            found = self.model(torch.tensor([list(tokens)]), use_cache=False).logits
        return np.asarray(found[0].numpy())

    def log_probabilities(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the log probabilities ``[T, V]`` of a sequence."""
        return np.asarray(torch.log_softmax(torch.from_numpy(self.logits(tokens)), -1).numpy())

    def load(self) -> Any:
        """Load the folder into mlx-lm with the hooks."""
        with vllm_moe_compat.applied():
            return mlx_lm.utils.load_model(self.folder)[0]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def step_by_step(model: Any, tokens: Sequence[int], prompt: int) -> np.ndarray:
    """Return the logits ``[T, V]`` of ``prompt`` tokens at once and the others one by one."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    pieces = [list(tokens[:prompt]), *([token] for token in tokens[prompt:])]
    return np.concatenate(
        [np.array(model(mx.array([piece]), cache=cache)[0].astype(mx.float32)) for piece in pieces]
    )
