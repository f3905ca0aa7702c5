"""Cells of the parity tests in FP4 whose tensors may be replaced."""

from __future__ import annotations

import json

import mlx.core as mx
import torch

from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, Cell, build
from support.checkpoints import Checkpoint

MLX_GLOBAL = 6.0 * 448.0
LAYER = "model.layers.0"


def cell(family: str, form: str) -> Cell:
    """A cell whose tensors may be replaced."""
    made = build(FAMILIES[family], FORM_BY_NAME[form])
    return Cell(
        Checkpoint(dict(made.checkpoint.tensors), json.loads(json.dumps(made.checkpoint.config))),
        made.reference,
    )


def as_mlx(tensor: torch.Tensor) -> mx.array:
    """Return a tensor's bytes."""
    return mx.array(tensor.contiguous().view(torch.uint8).numpy())
