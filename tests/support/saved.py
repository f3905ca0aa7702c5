"""What transformers computes for a folder, and tiny checkpoints that it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from parity.families import FAMILIES
from parity.family import Family
from parity.reference import TOKENS, Reference, State, reference
from support.checkpoints import Checkpoint


def saved(name: str) -> tuple[State, dict[str, Any]]:
    """Return a family's tensors and config as transformers saves them; callers may change both."""
    found = reference(name)
    return dict(found.saved), json.loads(json.dumps(found.config))


def write(folder: Path, tensors: State, config: dict[str, Any]) -> Path:
    return Checkpoint(tensors, config).write(folder)


def transformers_logits(folder: Path, family: Family | str) -> np.ndarray:
    """Return the logits of the model that ``from_pretrained`` makes of the folder."""
    found = FAMILIES[family] if isinstance(family, str) else family
    model_class = getattr(transformers, found.classes[1])
    model = model_class.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    return logits


def oracle(folder: Path, family: Family | str) -> Reference:
    """Return the same, to judge a load against."""
    return Reference({}, {}, {}, transformers_logits(folder, family))
