"""Random transformers models, made once per size: the oracle of the parity tests.

Every tensor is random. Matrices hold four significant bits in ten binades, times
``grain``: numbers that E4M3 times a scale represents exactly, whatever the blocks
are and however their scales differ by powers of two. So one model and one forward
pass serve all forms, and FP8 loses nothing. A grain of 1 suits scales that are
powers of two, and arithmetic in bfloat16; with the other grain an implementation
that rounds the product to bfloat16 shows.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from parity.families import FAMILIES
from parity.family import VOCAB, Family

TOKENS = [(7 * i * i + 3 * i + 5) % VOCAB for i in range(37)]
GRAIN = 179 / 128  # eight significant bits

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """A random transformers model: its two saved forms, its config and its logits."""

    saved: State
    in_library: State
    config: dict[str, Any]
    logits: np.ndarray

    def distance(self, found: np.ndarray) -> float:
        return float(np.abs(found - self.logits).max() / np.abs(self.logits).max())


@functools.cache
def reference(
    name: str, ragged: bool = False, grain: float = GRAIN, steps: bool = False
) -> Reference:
    """Return the family's reference; callers must not change it.

    Its matrices hold four significant bits, or with ``steps`` the six numbers of ``six_steps``.
    """
    model = new_model(FAMILIES[name], ragged, grain, steps)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    assert np.isfinite(logits).all()
    with tempfile.TemporaryDirectory() as folder:
        saved, config = _save(model, Path(folder, "saved"))
        in_library, _ = _save(model, Path(folder, "in-library"), save_original_format=False)
    return Reference(saved, in_library, config, logits)


def new_config(family: Family, ragged: bool = False) -> Any:
    """Return the family's transformers configuration."""
    name = family.classes[0]
    text_name = name.replace("Config", "TextConfig")
    if family.outer is None and hasattr(transformers, text_name):
        name = text_name
    config_class, settings = getattr(transformers, name), family.settings(ragged)
    if "num_experts" in config_class.__annotations__ and "n_routed_experts" in settings:
        settings.setdefault("num_experts", settings["n_routed_experts"])  # Two words for one.
    return config_class(**settings)


def new_model(family: Family, ragged: bool, grain: float, steps: bool = False) -> Any:
    """Return the family's transformers model with random values in every tensor."""
    config = new_config(family, ragged)
    model_class = getattr(transformers, family.classes[1])
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.numel():
                tensor.copy_(_values(key, tensor, grain, generator, steps))
    return model


def _values(
    key: str, tensor: torch.Tensor, grain: float, generator: torch.Generator, steps: bool
) -> torch.Tensor:
    leaf = key.rpartition(".")[2]
    if leaf == "A_log":  # mild decays; with strong ones the states are mostly noise
        return (torch.rand(tensor.shape, generator=generator) * 3 - 3).bfloat16().float()
    if tensor.ndim > 1 and tensor.shape[-1] > 1 and "bias" not in leaf:
        normal = torch.randn(tensor.shape, generator=generator).clamp(-3.99, 3.99)
        rounded = six_steps(normal) if steps else four_bits(normal)
        return rounded * 2.0 ** round(-math.log2(tensor.shape[-1]) / 2) * grain
    steps = torch.randint(-16, 17, tensor.shape, generator=generator) / 64
    return steps if "bias" in leaf or leaf == "sinks" else 1 + steps


def four_bits(values: torch.Tensor) -> torch.Tensor:
    """Round to four significant bits, and small numbers to multiples of 2**-8."""
    mantissa, exponent = torch.frexp(values)
    exponent = exponent.clamp(min=-4)
    step = torch.ldexp(torch.ones_like(mantissa), exponent - 4)
    return (values / step).round() * step


def six_steps(values: torch.Tensor) -> torch.Tensor:
    """Round to 0, 1, 2, 3, 4 or 6 halves, which E2M1 has with a scale of 1 and of 1/2."""
    steps = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    nearest = (values.abs()[..., None] - steps).abs().argmin(-1)
    return steps[nearest] * values.sign()


def _save(model: Any, folder: Path, **options: Any) -> tuple[State, dict[str, Any]]:
    model.save_pretrained(folder, **options)
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state, json.loads((folder / "config.json").read_text())
