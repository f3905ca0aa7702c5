"""The package's recorded probes, computed anew by transformers.

``families.json`` of ``vllm_moe_compat.probes`` is written from here by
``scripts/docs/probes``; a test compares. Tensors get the values that the package gives
them, transformers loads them, and some of its logits are what is recorded.
"""

from __future__ import annotations

import json
import re
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

import vllm_moe_compat
from parity import experts as ex
from parity import mlx_families
from parity import test_without_transformers as without
from parity.dense import DENSE
from parity.families import FAMILIES, MOE
from parity.family import Family
from parity.forms import FORM_BY_NAME, build
from parity.reference import State, reference
from parity.release import release_config, release_names
from support.checkpoints import Checkpoint
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.probes import recipes as recorded

# Besides one family per module and more: what only these show.
VARIANTS = (
    "qwen3_5 softmax",
    "qwen3_vl_moe tied",
    "mistral3 mistral4",
    "deepseek_v3 deep",
    "kimi_k25 deep",
)
ROWS = {module.rpartition(".")[2]: row for module, row in TRANSFORMS_BY_MODULE.items()}
NAMES = (*(f.name for f in MOE + DENSE if f.module in ROWS), *VARIANTS)
OWN = {family.module: family for family in mlx_families.FAMILIES if family.runs}
# What no loader of text reads; one module of mlx-lm's looks at the architecture.
NOISE = {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
KEPT = "BailingMoeV3ForCausalLM"
Shapes = dict[str, tuple[int, ...]]
Entry = dict[str, Any]


def entry(name: str, *, logits: bool = True) -> Entry:
    """Return a family's record; the logits take longest and can be left out."""
    if name in OWN:
        return _of_mlx_lm(OWN[name], logits)
    return _of_transformers(FAMILIES[name], logits)


def _of_transformers(family: Family, logits: bool) -> Entry:
    made = reference(family.name)
    published = build(family, FORM_BY_NAME["release"]).checkpoint.tensors
    values, release = _recipe(published)
    release["config"] = _clean(release_config(family.base, made.config))
    if logits:
        release["logits"] = _logits(family, _as_saved(family, values, made.saved))
    found = {"module": family.module, "oracle": "transformers", "release": release}
    if (saved := _clean(saved_config(family))) != release["config"]:
        found["saved"] = saved
    row = ROWS[family.module]
    if (row.renames or row.splits) and made.in_library.keys() != made.saved.keys():
        values, library = _recipe(made.in_library)
        library["config"] = _clean(made.config)
        if logits:
            library["logits"] = _logits(family, {**made.in_library, **values})
        found["library"] = library
    return found


def _recipe(tensors: State) -> tuple[State, Entry]:
    """Return the tensors with their recorded values, and the names and shapes to record."""
    folded = recorded.fold_shapes({name: tuple(value.shape) for name, value in tensors.items()})
    values = {
        name: torch.from_numpy(recorded.values(index, name, shape))
        for index, (name, shape) in enumerate(recorded.expand(folded).items())
    }
    assert values.keys() == tensors.keys()
    return values, {"tensors": folded}


def _as_saved(family: Family, values: State, saved: State) -> State:
    """Return a release's tensors as transformers saves them; what it leaves out, unchanged."""
    names = {name: name for name in saved}
    found = dict(saved)
    for released, name in release_names(family.base, names).items():  # type: ignore[arg-type]
        kept = found[str(name)]
        value = values.get(released)
        if value is None:
            value = _expert(released, values)
        elif value.shape != kept.shape:
            value = value.mT
        if value is not None:
            assert value.shape == kept.shape, released
            found[str(name)] = value
    return found


def _expert(name: str, values: State) -> torch.Tensor | None:
    """Return one expert of combined ones; None for LongCat's that do nothing."""
    match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    assert match is not None, name
    if f"{match[1]}.0.down_proj.weight" in values:
        return None
    parts = ex.Experts()
    for kind in ("gate_up_proj", "down_proj"):
        ex._take_combined(parts, "", kind, values[f"{match[1]}.{kind}"], False)
    return parts.parts[match[3]][int(match[2])]


def _logits(family: Family, state: State) -> list[float]:
    """Return what transformers computes with the tensors."""
    with tempfile.TemporaryDirectory() as folder:
        contiguous = {name: value.contiguous() for name, value in state.items()}
        save_file(contiguous, f"{folder}/model.safetensors", {"format": "pt"})
        config = json.dumps(reference(family.name).config)
        Path(folder, "config.json").write_text(config)
        model, info = getattr(transformers, family.classes[1]).from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    with torch.no_grad():
        logits = model.eval()(torch.tensor([recorded.TOKENS]), use_cache=False).logits[0]
    return _sample(logits.numpy())


def _of_mlx_lm(family: mlx_families.MlxFamily, logits: bool) -> Entry:
    """The record of a family that transformers lacks, from the plugin's own load."""
    checkpoint = without.checkpoint(family, "published")
    values, release = _recipe(checkpoint.tensors)
    release["config"] = _clean(dict(checkpoint.config))
    if logits:
        release["logits"] = _own_logits(Checkpoint(values, checkpoint.config))
    return {"module": family.module, "oracle": "mlx-lm", "release": release}


def _own_logits(checkpoint: Checkpoint) -> list[float]:
    with tempfile.TemporaryDirectory() as folder, vllm_moe_compat.applied():
        model, _ = mlx_lm.utils.load_model(checkpoint.write(Path(folder), shards=1))
    model.set_dtype(mx.float32)
    return _sample(np.array(model(mx.array([recorded.TOKENS]))[0]))


def _sample(logits: np.ndarray) -> list[float]:
    assert np.isfinite(logits).all()
    return [float(f"{value:.7g}") for value in logits[-1, :: recorded.EVERY]]


def saved_config(family: Family) -> dict[str, Any]:
    """Return the config that transformers 5 writes; nested if it lacks the outer class."""
    saved = deepcopy(reference(family.name).config)
    released = release_config(family.base, saved)
    if "text_config" not in released or "text_config" in saved:
        return saved
    return released | {"text_config": saved}


def _clean(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _clean(value) if key == "text_config" else value
        for key, value in config.items()
        if key not in NOISE or KEPT in str(value)
    }
