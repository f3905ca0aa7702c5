"""Checkpoints of packed integers, and transformers' logits on the values that they stand for.

Integers, scales and zero points are drawn anew for every matrix. Their values, by the
definition in ``support.packed``, go into transformers' own model; the integers go into the
checkpoint, in the layout of the form.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from parity import experts as ex
from parity.family import Family
from parity.reference import TOKENS, Reference, State, reference
from parity.release import DROPPED, RENAMED, release_config, release_names
from support.checkpoints import Checkpoint
from support.packed import Ints, PackedForm

# Their released names or layout are not what transformers loads back.
NOT_LOADED = {*RENAMED, *DROPPED, "qwen3_vl_moe", "longcat_flash", "gpt_oss", "llama4"}
"""Families whose released tensors transformers does not load under the released names, or
whose combined experts are transposed."""


Layout = Callable[[str, str, ex.Experts], State]


class Packer:
    """Draws integers for matrices and finds them again by their values."""

    def __init__(self, form: PackedForm) -> None:
        self._form = form
        self._generator = np.random.default_rng(7)
        self._known: dict[bytes, Ints] = {}

    def values(self, matrices: torch.Tensor) -> torch.Tensor:
        """Return new values for ``[…, O, I]``."""
        if matrices.ndim > 2:
            return torch.stack([self.values(matrix) for matrix in matrices])
        ints = self._form.draw(self._generator, *matrices.shape)
        self._known[ints.values.tobytes()] = ints
        return torch.from_numpy(ints.values)

    def ints(self, matrix: torch.Tensor) -> Ints:
        """Return the integers of ``[O, I]``, or of two such matrices one above the other."""
        found = self._known.get(matrix.contiguous().numpy().tobytes())
        if found is not None:
            return found
        upper, lower = (self.ints(half) for half in matrix.chunk(2))
        joined = {
            name: np.concatenate([getattr(upper, name), getattr(lower, name)])
            for name in ("q", "scale", "zero")
        }
        return replace(upper, **joined)

    def store(self, name: str, matrices: torch.Tensor) -> State:
        """Return the stored tensors of ``[O, I]`` or ``[E, O, I]``."""
        if matrices.ndim == 2:
            return self._form.store(name, self.ints(matrices))
        name = name if name.endswith(".weight") else f"{name}.weight"
        each = [self._form.store(name, self.ints(matrix)) for matrix in matrices]
        return {key: torch.stack([state[key] for state in each]) for key in each[0]}


def packed_cell(
    family: Family,
    form: PackedForm,
    layout: Layout,
    linear: Callable[[str, torch.Tensor], bool],
    ragged: bool,
) -> tuple[Checkpoint, Reference]:
    """Return the family's checkpoint in the form, and the reference of its values."""
    packed, plain, layers = pack(family, form, layout, linear, ragged)
    found = reference(family.name, ragged)
    own: State = {}
    for path, layer in layers.items():
        single = family.base in ex.COMBINED
        own |= (ex.own_single if single else ex.released)(family.base, path, layer)
    logits = _logits(family, plain | own, found.config)
    return packed, replace(found, logits=logits)


def packed_and_plain(
    family: Family,
    form: PackedForm,
    layout: Layout,
    linear: Callable[[str, torch.Tensor], bool],
) -> tuple[Checkpoint, Checkpoint]:
    """Return the family's checkpoint in the form, and its release with the same values."""
    packed, plain, layers = pack(family, form, layout, linear, ragged=False)
    for path, layer in layers.items():
        plain |= ex.released(family.base, path, layer)
    config = {k: v for k, v in packed.config.items() if k != "quantization_config"}
    return packed, Checkpoint(plain, config)


def pack(
    family: Family,
    form: PackedForm,
    layout: Layout,
    linear: Callable[[str, torch.Tensor], bool],
    ragged: bool,
) -> tuple[Checkpoint, State, dict[str, ex.Experts]]:
    """Return the checkpoint in the form, and the values: all but the experts, and these."""
    found = reference(family.name, ragged)
    rest, layers = ex.take_experts(family.base, release_names(family.base, found.saved))
    packer = Packer(form)
    # A module whose rows fill no words is spared; no list names it.
    whole = 8 if ragged else 32
    chosen = {n for n, value in rest.items() if linear(n, value) and value.shape[0] % whole == 0}
    plain = {n: packer.values(value) if n in chosen else value for n, value in rest.items()}
    drawn = {
        path: replace(layer, parts={p: packer.values(value) for p, value in layer.parts.items()})
        for path, layer in layers.items()
    }
    tensors: State = {}
    for name, value in plain.items():
        tensors |= packer.store(name, value) if name in chosen else {name: value}
    for path, layer in drawn.items():
        for name, value in layout(family.base, path, layer).items():
            tensors |= {name: value} if "bias" in name else packer.store(name, value)
    config = release_config(family.base, found.config)
    config["quantization_config"] = deepcopy(form.config)
    return Checkpoint(tensors, config), plain, drawn


def _logits(family: Family, state: State, config: dict[str, Any]) -> np.ndarray:
    model_class = getattr(transformers, family.classes[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = {key: value.contiguous() for key, value in state.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        model, info = model_class.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not info["missing_keys"], info["missing_keys"]
    with torch.no_grad():
        logits: np.ndarray = model.eval()(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    assert np.isfinite(logits).all()
    return logits
