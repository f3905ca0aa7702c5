"""Names that wrappers leave: which are changed, and to what."""

from __future__ import annotations

import pytest

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.families import modules
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.tensor_names import uniform_names, unknown_names, unmerged
from vllm_moe_compat.probes.recipes import families, families_of

ROWS = list(TRANSFORMS_BY_MODULE.values())
LLAMA = TRANSFORMS_BY_MODULE["mlx_lm.models.llama"]
PLAIN = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
]


def changed(names: list[str], row: Row = LLAMA) -> list[str]:
    found = uniform_names(names, row, row.ignored.of({"num_hidden_layers": 2}))
    return list(found.of(dict.fromkeys(names)))


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "model.", "llm.", "a.b."],
)
def test_a_prefix_of_all_names_is_removed(prefix: str):
    assert changed([prefix + name for name in PLAIN]) == PLAIN


def test_a_compiled_block_inside_is_unwrapped():
    names = [name.replace("layers.0.", "layers.0._orig_mod.") for name in PLAIN]
    assert changed(names) == PLAIN


def test_a_base_model_gets_its_prefix_and_the_head_none():
    assert changed([name.removeprefix("model.") for name in PLAIN]) == PLAIN


def test_only_the_model_is_doubled():
    assert changed([PLAIN[0], *("model." + name for name in PLAIN[1:])]) == PLAIN


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_language_model_of_a_larger_one(prefix: str):
    names = [name.replace("model.", prefix) for name in PLAIN]
    if prefix.startswith("language"):
        names[0] = f"language_model.{names[0]}"
    assert changed(names) == PLAIN


def test_a_checkpoint_without_tensors_has_no_names():
    assert changed([]) == []


def test_old_names_of_norms_are_refused():
    names = [*PLAIN[:-1], "model.norm.gamma", "model.layers.0.input_layernorm.beta"]
    tensors = {name: TensorInfo("F32", (4, 4), "model.safetensors") for name in names}
    (fault,) = unknown_names(tensors, LLAMA, modules.mlx_lm().words_of(LLAMA))
    assert "model.norm.gamma" in fault.message
    assert "rename gamma to weight" in fault.remedy


def test_names_that_would_collide_are_left():
    names = [*PLAIN, "_orig_mod.model.norm.weight"]
    assert changed(names) == names


def test_a_prefix_of_some_is_left_and_refused():
    names = [PLAIN[0], *(f"module.{name}" for name in PLAIN[1:])]
    assert changed(names) == names
    tensors = {name: TensorInfo("F32", (4, 4), "model.safetensors") for name in names}
    (fault,) = unknown_names(tensors, LLAMA, frozenset())
    assert "module.model.layers.0…1.self_attn.q_proj.weight do not begin" in fault.message
    assert "model.layers" in fault.message


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module.rpartition(".")[2])
def test_what_a_row_knows_is_never_touched_and_never_refused(row: Row):
    words = modules.mlx_lm().words_of(row)
    for family in families_of(row.module):
        for recipe in (family.release, family.library):
            if recipe is None:
                continue
            names = uniform_names(list(recipe.tensors), row, row.ignored.of(recipe.config))
            assert names.renamed == ()
            tensors = {n: TensorInfo("F32", shape) for n, shape in recipe.tensors.items()}
            assert [*unmerged(tensors), *unknown_names(tensors, row, words)] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module.rpartition(".")[2])
def test_another_models_tensors_are_known_by_nothing_or_by_their_names(row: Row):
    """GPT-NeoX has names of its own, in layers that stand where the module has them."""
    if not row.roots:
        return
    root = row.roots[0]
    tensors = {
        f"{root}layers.{n}.{name}": TensorInfo("F32", shape, "model.safetensors")
        for n in range(2)
        for name, shape in {
            "attention.query_key_value.weight": (12, 4),
            "mlp.dense_h_to_4h.weight": (16, 4),
            "input_layernorm.weight": (4,),
        }.items()
    }
    found = list(unknown_names(tensors, row, modules.mlx_lm().words_of(row)))
    known = {"query_key_value", "dense_h_to_4h"} & modules.mlx_lm().words_of(row)
    assert bool(found) != bool(known), known


def test_few_modules_know_the_names_of_gpt_neox():
    """Or the test before this one would say nothing."""
    own = {"query_key_value", "dense_h_to_4h"}
    assert sum(bool(own & modules.mlx_lm().words_of(row)) for row in ROWS) < 6


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_B.default.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.lora_a",
        "base_model.model.lm_head.modules_to_save.weight",
    ],
)
def test_an_unmerged_adapter_is_named(name: str):
    tensors = {**dict.fromkeys(PLAIN, TensorInfo("F32", (4, 4))), name: TensorInfo("F32", (4, 4))}
    (fault,) = unmerged(tensors)
    assert name in fault.message
    assert "merge_and_unload" in fault.remedy


def test_no_recorded_model_has_the_names_of_an_adapter():
    for family in families().values():
        assert (
            list(unmerged({n: TensorInfo("F32", s) for n, s in family.release.tensors.items()}))
            == []
        )
