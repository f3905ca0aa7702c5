"""Every form that a checkpoint of a family comes in, written by torch."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx_lm.utils
import numpy as np
import torch
from mlx.utils import tree_flatten

from parity import experts as ex
from parity import fp4
from parity import quantization as qc
from parity.dense import DENSE
from parity.families import FAMILIES
from parity.family import Family
from parity.fp8 import quantize
from parity.packed import NOT_LOADED, packed_cell
from parity.reference import GRAIN, Reference, State, reference
from parity.release import release_config, release_names
from parity.verdict import stock
from support.checkpoints import Checkpoint
from support.packed import (
    PackedForm,
    auto_round_form,
    awq_form,
    gptq_form,
    int_form,
    pack_form,
)
from vllm_moe_compat.families.installed import lacks
from vllm_moe_compat.probes.variants import LINEAR


@dataclass(frozen=True)
class Form:
    """A layout of the experts, and how their numbers are stored.

    ``block`` is the FP8 block, and ``scheme`` how scales are named and described; ``packed``
    is the form of packed integers. A tolerance larger than the family's is that of random
    integers, whose products round more than those of four bits;
    the size and the grain say which reference it is made from.
    """

    name: str
    layout: str = "released"
    scheme: str = ""
    block: tuple[int, int] | None = None
    scale: torch.dtype = torch.float32
    ragged: bool = False
    grain: float = GRAIN
    mtp: bool = False
    packed: PackedForm | None = None
    tolerance: float = 0.0

    @property
    def fp4(self) -> bool:
        """Whether weights are stored in FP4."""
        return "fp4" in self.scheme


@dataclass
class Cell:
    """A checkpoint in memory, and the reference of its model."""

    checkpoint: Checkpoint
    reference: Reference
    files: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        self.checkpoint.write(folder, shards=1)
        for name, value in self.files.items():
            (folder / name).write_text(json.dumps(value))
        return folder


BFLOAT16 = torch.bfloat16
RANDOM = 3e-5
FORMS = (
    Form("saved"),
    Form("in-library"),
    Form("release"),
    Form("per-expert", "per-expert"),
    Form("per-expert w1/w2/w3", "w1/w2/w3"),
    Form("combined", "combined"),
    Form("combined transposed", "transposed"),
    Form("MLX form"),
    Form("with MTP", mtp=True),
    Form("block FP8", "single", "block", (32, 32)),
    Form("block FP8 128", "single", "block", (128, 128), BFLOAT16, grain=1),
    Form("block FP8 combined", "own combined", "block", (32, 32)),
    Form("block FP8 ragged", "single", "block", (32, 16), ragged=True),
    Form("block FP8 E8M0", "single", "block", (16, 16), torch.float8_e8m0fnu, grain=1),
    Form("block FP8 with MTP", "single", "block", (128, 128), BFLOAT16, grain=1, mtp=True),
    Form("per-tensor FP8", "single", "tensor", grain=1),
    Form("per-channel FP8", "single", "channel"),
    Form("ModelOpt FP8", "single", "modelopt"),
    Form("int4", "single", packed=pack_form(4, 32), tolerance=RANDOM),
    Form(
        "int4 combined", "own combined", packed=pack_form(4, 32, symmetric=False), tolerance=RANDOM
    ),
    Form("int4 ragged", "single", packed=pack_form(4, 32), ragged=True, tolerance=RANDOM),
    Form("int4 act-order", "single", packed=pack_form(4, 32, order=True), tolerance=RANDOM),
    Form("int8 g64", "single", packed=pack_form(8, 64, symmetric=False), tolerance=RANDOM),
    Form("int8 W8A8", "single", packed=int_form(), tolerance=RANDOM),
    Form("GPTQ", "single", packed=gptq_form(4, 32), tolerance=RANDOM),
    Form("GPTQ combined", "own combined", packed=gptq_form(8, 32, v2=True), tolerance=RANDOM),
    Form("GPTQ 3-bit", "single", packed=gptq_form(3, 32, symmetric=True), tolerance=RANDOM),
    Form("GPTQ act-order", "single", packed=gptq_form(4, 32, order=True), tolerance=RANDOM),
    Form("AWQ", "single", packed=awq_form(32), tolerance=RANDOM),
    Form("AWQ ragged", "single", packed=awq_form(32), ragged=True, tolerance=RANDOM),
    Form("AutoRound", "single", packed=auto_round_form("gptq", 8), tolerance=RANDOM),
    Form("NVFP4", "single", "ct nvfp4"),
    Form("ModelOpt NVFP4", "single", "modelopt nvfp4"),
    Form("ModelOpt NVFP4 combined", "own combined", "modelopt nvfp4"),
    Form("ModelOpt FP8 and NVFP4", "single", "modelopt nvfp4 mixed"),
    Form("MXFP4", "single", "ct mxfp4", grain=1),
    Form("FP4 of DeepSeek", "single", "deepseek fp4", grain=1),
)
FORM_BY_NAME = {form.name: form for form in FORMS}

# Nemotron's experts have no gate; gpt-oss knows one combined layout, the alternating.
NOT = {
    "nemotron_h": {"per-expert w1/w2/w3", "combined transposed"},
    "gpt_oss": {"combined", "per-expert w1/w2/w3"},
    "step3p7": {"combined transposed", "per-expert w1/w2/w3"},
    # No form of theirs gets through upstream whole, so there is nothing converted.
    "ernie4_5_moe": {"MLX form"},
    "hunyuan_v1_moe": {"MLX form"},
    "kimi_vl": {"MLX form", "saved", "in-library"},
}
# Nor do they through older modules.
for _module, _sign in (
    ("nemotron_h", "linear_attention"),
    ("phimoe", "rope_scaling is None"),
    ("qwen3_vl", '.get("language_model")'),
    ("qwen3_vl_moe", '.get("language_model")'),
):
    if lacks(_module, _sign):
        NOT[_module] = {*NOT.get(_module, ()), "MLX form"}
_DENSE = {family.name for family in DENSE}


def applies(family: Family, form: Form) -> bool:
    """Whether the family comes in the form."""
    if form.packed is not None and family.base in NOT_LOADED:
        return False
    if family.forms:
        return form.name in family.forms
    if form.name in NOT.get(family.name, ()) or (form.mtp and not family.mtp):
        return False
    if family.name in _DENSE:
        return form.layout in ("released", "single")
    return True


CELLS = [(f, form) for f in FAMILIES.values() for form in FORMS if applies(f, form)]


def build(family: Family, form: Form) -> Cell:
    """Make the family's checkpoint in the form."""
    if form.packed is not None:
        layout = LAYOUTS[form.layout]
        return Cell(*packed_cell(family, form.packed, layout, _is_linear, form.ragged))
    found = reference(family.name, form.ragged, form.grain, form.fp4)
    if form.name == "saved":
        return Cell(Checkpoint(found.saved, found.config), found)
    if form.name == "in-library":
        return Cell(Checkpoint(found.in_library, found.config), found)
    if form.name == "MLX form":
        return converted(family, found)
    config = release_config(family.base, found.config)
    rest, layers = ex.take_experts(family.base, release_names(family.base, found.saved))
    if form.mtp:
        rest |= _mtp(family, rest)
        layers |= _mtp(family, layers)
        config.get("text_config", config)["num_nextn_predict_layers"] = 1
    put: State = {}
    for path, layer in layers.items():
        put |= LAYOUTS[form.layout](family.base, path, layer)
    tensors = rest | put
    files: dict[str, Any] = {}
    if form.scheme:
        chosen = {name for name, value in rest.items() if _is_linear(name, value)}
        chosen |= {name for name in put if "bias" not in name}
        turned = family.base in ex.TRANSPOSED
        tensors = _to_fp8(tensors, chosen, config, files, form, turned)
        if form.mtp:  # nobody reads that layer: it may be incomplete
            for name in [name for name in tensors if name.startswith(family.mtp)][::5]:
                del tensors[name]
    return Cell(Checkpoint(tensors, config), found, files)


def converted(family: Family, found: Reference) -> Cell:
    """Return the checkpoint that mlx-lm saves after it loads one of the other forms."""
    config = release_config(family.base, found.config)
    if family.name == "gpt_oss":  # loads none
        rest, layers = ex.take_experts(family.base, release_names(family.base, found.saved))
        for path, layer in layers.items():
            for part, name in ex.NAMES.items():
                rest[f"{path}.{name}.weight"] = layer.parts[part]
                rest[f"{path}.{name}.bias"] = layer.biases[part]
        return Cell(Checkpoint(rest, config), found)
    for name in ("release", "combined", "combined transposed"):
        cell = build(family, FORM_BY_NAME[name])
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ValueError):
            with stock():
                model, _ = mlx_lm.utils.load_model(cell.write(Path(folder)))
            arrays = dict(tree_flatten(model.parameters()))
            tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
            return Cell(Checkpoint(tensors, config), found)
    raise LookupError(f"mlx-lm loads no form of {family.name}")


LAYOUTS: dict[str, Callable[[str, str, ex.Experts], State]] = {
    "released": ex.released,
    "single": ex.own_single,
    "own combined": ex.own_combined,
    "per-expert": lambda family, path, layer: ex.per_expert(path, layer),
    "w1/w2/w3": lambda family, path, layer: ex.per_expert(path, layer, ex.SHORT),
    "combined": lambda family, path, layer: ex.combined(family, path, layer),
    "transposed": lambda family, path, layer: ex.combined(family, path, layer, True),
}


def _mtp(family: Family, found: dict[str, Any]) -> dict[str, Any]:
    """A further layer like the last one, under the family's prefix for it."""
    layer = re.compile(r"(.*\blayers\.)(\d+)\.(.+)")
    matches = [m for m in map(layer.fullmatch, found) if m and "vis" not in m[1]]
    if not matches:
        return {}
    last = max(int(m[2]) for m in matches)
    extra = {f"{family.mtp}{m[3]}": deepcopy(found[m[0]]) for m in matches if int(m[2]) == last}
    if any(isinstance(value, torch.Tensor) for value in extra.values()):
        extra[f"{family.mtp}eh_proj.weight"] = torch.ones(8, 16)
        extra[f"{family.mtp}enorm.weight"] = torch.ones(8)
    return extra


def _is_linear(name: str, value: torch.Tensor) -> bool:
    """Whether FP8 releases convert it: attention's and feed-forward's projections."""
    return value.ndim == 2 and LINEAR.fullmatch(name) is not None


def _to_fp8(
    tensors: State,
    chosen: set[str],
    config: dict[str, Any],
    files: dict[str, Any],
    form: Form,
    turned: bool = False,
) -> State:
    """Return the tensors with the chosen ones in FP8, and describe that."""
    generator = torch.Generator().manual_seed(2)
    stored: State = {}
    for name, value in tensors.items():
        if name not in chosen:
            stored[name] = value
            continue
        if form.fp4 and _to_fp4(stored, name, value, form, generator, turned):
            continue
        block = (1, value.shape[-1]) if form.scheme == "channel" else form.block
        stored[name], scale = quantize(value, block, form.grain, generator)
        scheme = "modelopt" if form.fp4 else form.scheme
        stored |= qc.scales(scheme, name, scale.to(form.scale))
    kept = sorted(n.removesuffix(".weight") for n in tensors.keys() - chosen if tensors[n].ndim > 1)
    if form.fp4:
        config["quantization_config"] = fp4.config(form.scheme, kept)
        return stored
    config["quantization_config"] = qc.config(form.scheme, form.block, form.scale, kept)
    files |= qc.files(form.scheme, kept)
    return stored


def _to_fp4(
    stored: State,
    name: str,
    value: torch.Tensor,
    form: Form,
    generator: torch.Generator,
    turned: bool,
) -> bool:
    """Store a weight in FP4, or as floats where rows are no whole groups; False for FP8.

    Columns under one scale are those that a product sums over, so combined experts that are
    ``turned``, ``[E, I, O]``, are packed along ``I`` and stored in that order of axes.
    """
    scheme, mixed = form.scheme.removesuffix(" mixed"), form.scheme.endswith(" mixed")
    if mixed and "expert" not in name:
        return False
    if scheme == "deepseek fp4" and "expert" not in name:
        stored[name] = value
        return True
    mode = "nvfp4" if "nvfp4" in scheme else "mxfp4"
    turned = turned and value.ndim == 3
    matrix = value.mT if turned else value
    if not fp4.fits(matrix, mode):
        stored[name] = value
        return True
    packed, scale, shared = fp4.quantize(matrix, mode, form.grain, generator)
    if turned:
        packed, scale = packed.mT, scale.mT
    stored |= fp4.tensors(scheme, name, packed, scale, shared)
    return True
