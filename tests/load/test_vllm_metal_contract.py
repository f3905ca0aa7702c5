"""What is handed to vllm-metal has what its wrappers look for, family by family.

Every row of the registry is loaded from a tiny checkpoint, an FP8 one where the
family comes in FP8, and held against the list in ``support/vllm_metal.py``. That
list is vllm-metal's; what it does not know how to wrap is listed here by name, so
that the day on which mlx-lm or this package changes what is there does not pass
unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx_lm.utils
import pytest
import torch
import transformers

import vllm_moe_compat
from parity.available import is_installed
from parity.families import EVERY, FAMILIES, LEFT_OUT
from parity.family import Family
from parity.forms import FORM_BY_NAME, applies, build
from parity.mlx_families import FAMILIES as MLX_FAMILIES
from parity.mlx_families import MlxFamily
from parity.test_without_transformers import checkpoint
from support import vllm_metal
from support.loading import parameters, same_bits
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE

# Module: what vllm-metal would miss, a part of each item.
NO_ROTATION = ("rope or rotary_emb",)  # layers without positions
KDA = ("a wrapper for", "n_kv_heads", "rope", "scale", "q_lora_rank", "q_head_dim", "o_proj")
MISSED: dict[str, tuple[str, ...]] = {
    "llama4": NO_ROTATION,
    "exaone4": NO_ROTATION,
    "exaone_moe": NO_ROTATION,
    "jamba": NO_ROTATION,
    "muse_glimmer": NO_ROTATION,
    # Its linear layers have q_proj, and are taken for softmax attention.
    "olmo_hybrid": ("n_heads", "n_kv_heads", "scale", "rope"),
    # Kimi's delta attention, lightning attention.
    "kimi_linear": KDA,
    "kimi_k3": KDA,
    "bailing_hybrid": KDA,
    "bailing_moe_v3": KDA,
    "bailing_moe_linear": ("a wrapper for",),
    # One matrix for queries, keys and values, under another name.
    "bailing_moe": ("a wrapper for",),
    "phixtral": ("a wrapper for", "argument"),
    # Attention that is none of its kinds.
    "muse_spark": ("a wrapper for",),
    # Two attentions in a layer, in a list.
    "longcat_flash": ("a wrapper for", "argument num_hidden_layers"),
    "longcat_flash_ngram": ("a wrapper for", "argument num_hidden_layers"),
}
# The class is another row's, or its forward pass is not mlx-lm's to build small.
ELSEWHERE = {"deepseek_v41", "gemma4_text", "youtu_llm"}


def from_transformers(family: Family, folder: Path) -> Path:
    forms = ("block FP8", "release", *family.forms)
    form = next(form for form in forms if applies(family, FORM_BY_NAME[form]))
    return build(family, FORM_BY_NAME[form]).write(folder)


def from_mlx(family: MlxFamily, folder: Path) -> Path:
    form = (family.forms or ["published"])[-1]
    return checkpoint(family, form).write(folder, shards=1)


ROWS = {module.rpartition(".")[2] for module in TRANSFORMS_BY_MODULE}
CASES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    **{
        family.name: (family.module, lambda folder, f=family: from_transformers(f, folder))
        for family in FAMILIES.values()
        if family.name == family.base and family.module in ROWS
    },
    **{
        family.module: (family.module, lambda folder, f=family: from_mlx(f, folder))
        for family in MLX_FAMILIES
    },
}


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    vllm_moe_compat.apply()
    yield
    vllm_moe_compat.revert()


def test_every_row_is_held_against_the_list() -> None:
    left_out = {EVERY[name].module for name in LEFT_OUT}
    there = {module for module in ROWS if is_installed(module)}
    assert there - left_out - {module for module, _ in CASES.values()} == ELSEWHERE & there
    assert MISSED.keys() <= ROWS


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_has_what_vllm_metal_looks_for(name: str, tmp_path: Path) -> None:
    module, write = CASES[name]
    model, _ = mlx_lm.utils.load_model(write(tmp_path))
    wrapped, missing = vllm_metal.unmet(model)
    unexplained = [m for m in missing if not any(word in m for word in MISSED.get(module, ()))]
    assert not unexplained
    if module in MISSED:
        assert missing, f"vllm-metal can wrap {module} now: take it out of MISSED"
    else:
        assert wrapped


def test_the_demo_checkpoint_has_all_of_it(demo_checkpoint: Any) -> None:
    """A Qwen3.5 MoE with the hub's config: nothing is missing there."""
    model, _ = mlx_lm.utils.load_model(demo_checkpoint.path)
    wrapped, missing = vllm_metal.unmet(model)
    assert wrapped == {"gated delta": 3, "softmax": 1}
    assert missing == []


def test_a_folder_of_links_under_other_names(demo_checkpoint: Any, tmp_path: Path) -> None:
    """Shards not called ``model…``: vllm-metal links them under names that mlx-lm reads.

    As its ``v1/mlx_lm_paths.py`` does at commit f29748da8a43: links, and an index that
    names them.
    """
    index = "model.safetensors.index.json"
    described = json.loads((demo_checkpoint.path / index).read_text())
    shards = sorted(set(described["weight_map"].values()))
    links = {
        shard: f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number, shard in enumerate(reversed(shards), 1)
    }
    published = tmp_path / "published"
    linked = tmp_path / "linked"
    published.mkdir()
    linked.mkdir()
    for number, (shard, link) in enumerate(links.items()):
        (published / f"layers-{number}.safetensors").symlink_to(demo_checkpoint.path / shard)
        (linked / link).symlink_to(published / f"layers-{number}.safetensors")
    (linked / "config.json").symlink_to(demo_checkpoint.path / "config.json")
    weight_map = {name: links[shard] for name, shard in described["weight_map"].items()}
    (linked / index).write_text(json.dumps(described | {"weight_map": weight_map}))
    model, _ = mlx_lm.utils.load_model(linked)
    whole, _ = mlx_lm.utils.load_model(demo_checkpoint.path)
    assert same_bits(parameters(model), parameters(whole))
