"""Families without a class in transformers: a load returns the parameters that were written.

A tiny model of mlx-lm's is written as the family publishes it and in other forms, and
loaded through the plugin: every parameter must be the same, bit for bit, and the
logits with them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import vllm_moe_compat
from parity import quantization as qc
from parity.fp8 import quantize
from parity.mlx_families import FAMILIES, MlxFamily, Tensors
from parity.reference import GRAIN, TOKENS, four_bits
from support.checkpoints import Checkpoint
from support.loading import new_model, parameters, same_bits
from support.rewriting import layout_to
from vllm_moe_compat.families.registry import row_for
from vllm_moe_compat.families.row import COMBINED, PER_EXPERT
from vllm_moe_compat.rewrite.run_rewrite import rewrite

BLOCK = (32, 32)
# Form: layout, none being the family's own, and how FP8 is described.
FORMS: dict[str, tuple[str, str]] = {
    "published": ("", ""),
    "per-expert": (PER_EXPERT, ""),
    "combined": (COMBINED, ""),
    "block FP8": (PER_EXPERT, "block"),
    "per-channel FP8": (PER_EXPERT, "channel"),
}
CELLS = [
    (family, form)
    for family in FAMILIES
    for form in family.forms or [name for name in FORMS if name != "per-expert"]
]
# Embeddings, heads, routers and gates as wide as there are heads stay as they are.
_SPARED = re.compile(
    r"embed|wte|lm_head|\.gate\.weight|classifier|coefficient|conv1d|b_proj\.weight$(?<!kv_b_proj"
    r"\.weight)(?<!q_b_proj\.weight)"
)


@dataclass(frozen=True)
class Made:
    """A model's configuration, its parameters and logits."""

    config: dict[str, Any]
    parameters: Tensors
    logits: mx.array | None


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    vllm_moe_compat.apply()
    yield
    vllm_moe_compat.revert()


@functools.cache
def made(family: MlxFamily) -> Made:
    config = {"model_type": family.module, **family.config}
    model = new_model(config)
    generator = torch.Generator().manual_seed(1)
    found = {
        name: mx.array(_values(name, tuple(array.shape), generator).numpy())
        for name, array in parameters(model).items()
    }
    found = family.values(found)
    model.load_weights(list(found.items()))
    return Made(config, found, _logits(model) if family.runs else None)


def _logits(model: Any) -> mx.array:
    logits = model(mx.array([TOKENS]))
    mx.eval(logits)
    assert mx.isfinite(logits).all().item()
    return logits


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Matrices hold four significant bits in ten binades: FP8 loses none of them."""
    leaf = name.rpartition(".")[2]
    if leaf == "A_log":
        return torch.rand(shape, generator=generator) * 3 - 3
    if len(shape) > 1 and shape[-1] > 1 and leaf == "weight":
        normal = torch.randn(shape, generator=generator).clamp(-3.99, 3.99)
        return four_bits(normal) / 8 * GRAIN
    steps = torch.randint(-16, 17, shape, generator=generator) / 64
    return steps if "bias" in leaf else 1 + steps


def checkpoint(family: MlxFamily, form: str) -> Checkpoint:
    """Write the model in the form; the experts by the inverse of a plan."""
    reference = made(family)
    layout, scheme = FORMS[form]
    config = dict(reference.config)
    row = row_for(type(new_model(config)))
    assert row is not None
    written = rewrite(dict(reference.parameters), row, config, layout_to(layout or family.layout))
    tensors: dict[str, torch.Tensor] = {}
    for name, array in family.published(dict(written)).items():
        tensors[name] = torch.from_numpy(np.array(array.astype(mx.float32)))
    if scheme:
        tensors = _to_fp8(tensors, scheme)
        config["quantization_config"] = qc.config(
            scheme, BLOCK if scheme == "block" else None, torch.float32, ["lm_head"]
        )
    return Checkpoint(tensors, config)


def _to_fp8(tensors: dict[str, torch.Tensor], scheme: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    stored: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if value.ndim != 2 or not name.endswith(".weight") or _SPARED.search(name):
            stored[name] = value
            continue
        block = BLOCK if scheme == "block" else (1, value.shape[-1])
        stored[name], scale = quantize(value, block, GRAIN, generator)
        stored |= qc.scales(scheme, name, scale)
    return stored


@pytest.mark.parametrize(
    ("family", "form"), CELLS, ids=[f"{family.module}-{form}" for family, form in CELLS]
)
def test_every_parameter_comes_back(family: MlxFamily, form: str, tmp_path: Path):
    reference = made(family)
    folder = checkpoint(family, form).write(tmp_path, shards=1)
    model, _ = mlx_lm.utils.load_model(folder)
    assert type(model).__module__ == f"mlx_lm.models.{family.module}"
    found = dict(tree_flatten(model.parameters()))
    assert found.keys() == reference.parameters.keys()
    wrong = [n for n in found if not same_bits({n: found[n]}, {n: reference.parameters[n]})]
    assert not wrong
    if reference.logits is not None:
        assert mx.array_equal(_logits(model), reference.logits)
