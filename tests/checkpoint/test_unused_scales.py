"""Scales of activations and caches are set aside by name, on every row, and nothing else is."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from mlx.utils import tree_flatten
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.model_loader.weight_utils import maybe_remap_kv_scale_name

import vllm_moe_compat
from support.agreement import check_agreement, planned_loads
from support.checkpoints import PREFIX, Fp8, build
from support.loading import load, parameters, same_bits
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.unused_scales import unused_scales
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.plan.make import make_from_tensors
from vllm_moe_compat.plan.serving import Serving

ATTENTION = "model.layers.0.self_attn"
NAMES = (
    *(f"{ATTENTION}.{p}_proj.{p}_scale" for p in "kv"),
    *(f"{ATTENTION}.qkv_proj.{p}_scale" for p in "kv"),
    *(f"{ATTENTION}.qkqkv_proj.{p}_scale" for p in "kv"),
    *(f"model.layers.0.mixer.{p}_proj.{p}_scale" for p in "kv"),
    *(f"{ATTENTION}.{p}_{kind}" for p in "qkv" for kind in ("scale", "zero_point")),
    *(f"{ATTENTION}.attn.{p}_scale" for p in "qkv"),
    *(f"{ATTENTION}.{p}_cache.scale" for p in "kv"),
    *(f"{ATTENTION}.{p}_proj.output_scale" for p in "qkv"),
    f"{ATTENTION}.q.scale",
    f"{ATTENTION}.kv_scale",
    f"{ATTENTION}.prob_output_scale",
    f"{ATTENTION}.attn.prob_scale",
)
BESIDE_WEIGHTS = (
    "model.layers.0.mlp.down_proj.input_scale",
    "model.layers.0.mlp.down_proj.input_global_scale",
    "model.layers.0.mlp.down_proj.activation_scale",
    "model.layers.0.mlp.down_proj.input_zero_point",
    "model.layers.0.mlp.experts.3.w1.input_scale",
    "model.layers.0.mlp.experts.gate_up_proj_input_scale",
    "model.layers.0.mlp.experts.down_proj_activation_scale",
    "model.layers.0.mlp.experts.w13_input_scale",
)


def endings_in_vllm() -> set[str]:
    """Return the endings that vLLM's own function looks for."""
    tree = ast.parse(inspect.getsource(maybe_remap_kv_scale_name))
    return {
        constant.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "endswith"
        for constant in ast.walk(call)
        if isinstance(constant, ast.Constant)
    }


def test_every_ending_that_vllm_remaps_is_known():
    endings = endings_in_vllm()
    assert len(endings) >= 10, endings
    names = [f"{ATTENTION}{ending}" for ending in endings]
    assert set(unused_scales(names)) == set(names)


def test_every_suffix_of_vllms_mappers_is_known():
    for config in (Fp8Config, QuarkConfig):
        mapper = config.get_cache_scale_mapper()
        names = [f"model.layers.0{s}" for s in mapper.orig_to_new_suffix]
        assert names
        assert set(unused_scales(names)) == set(names)
        for name in NAMES:
            if any(pattern.search(name) for pattern in mapper.orig_to_new_regex):
                assert name in unused_scales([name])


@pytest.mark.parametrize("name", [*NAMES, *BESIDE_WEIGHTS])
def test_scales_of_activations_and_caches(name: str):
    assert unused_scales([name]) == (name,)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight_scale",
        "model.layers.0.mlp.down_proj.weight_scale_2",
        "model.layers.0.mlp.down_proj.weight_global_scale",
        "model.layers.0.altup.correct_output_scale",
        "model.layers.0.mlp.experts.down_proj_scale",
        "model.layers.0.router.per_expert_scale",
        "model.layers.0.mlp.act.scales",
    ],
)
def test_what_multiplies_weights_or_is_a_parameter(name: str):
    assert unused_scales([name]) == ()


def test_the_scale_of_a_module_with_a_weight_is_not_a_caches():
    names = [f"{ATTENTION}.q.weight", f"{ATTENTION}.q.scale", "model.layers.1.self_attn.q.scale"]
    assert unused_scales(names) == ("model.layers.1.self_attn.q.scale",)


def test_no_attribute_of_an_mlx_lm_module_has_such_a_name():
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    attributes: set[str] = set()
    for source in Path(folder, "models").glob("*.py"):
        text = source.read_text()
        attributes |= set(re.findall(r"\bself\.(\w+)\s*(?::[^=\n]+)?=[^=]", text))
        attributes |= set(re.findall(r"\bself\.\w+(?:\.\w+)*\.(\w+)\s*=[^=]", text))
    assert {"correct_output_scale", "quant_key_scale", "q_proj"} <= attributes
    names = [f"model.layers.0.{name}" for name in sorted(attributes)]
    assert unused_scales(names) == ()
    assert not attributes & {"k_cache", "v_cache", "q"} or "scale" not in attributes


def test_no_parameter_of_gemma3n_has_such_a_name():
    from mlx_lm.models import gemma3n

    text = {
        **{"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
        **{"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1, "vocab_size": 32},
        **{"vocab_size_per_layer_input": 32, "num_kv_shared_layers": 0, "rms_norm_eps": 1e-6},
        **{"hidden_size_per_layer_input": 8, "sliding_window": 8, "rope_theta": 1e4},
        **{"max_position_embeddings": 64, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 16},
        **{"rope_scaling": None, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4},
        **{"final_logit_softcapping": 30.0, "altup_active_idx": 0, "altup_num_inputs": 2},
        **{"altup_coef_clip": None, "altup_correct_scale": True, "altup_lr_multiplier": 1.0},
        **{"layer_types": ["sliding_attention", "full_attention"], "model_type": "gemma3n_text"},
    }
    args = gemma3n.ModelArgs(model_type="gemma3n", text_config=text)
    names = [name for name, _ in tree_flatten(gemma3n.Model(args).parameters())]
    assert any(name.endswith("correct_output_scale") for name in names)
    assert unused_scales(names) == ()


@pytest.mark.parametrize("module", TRANSFORMS_BY_MODULE)
@pytest.mark.parametrize("stored", ["BF16", "F8_E4M3"])
def test_every_row_drops_them(module: str, stored: str):
    weight = f"{ATTENTION}.k_proj.weight"
    tensors = {weight: TensorInfo(stored, (128, 128))}
    if stored != "BF16":
        tensors[f"{weight}_scale_inv"] = TensorInfo("F32", (1, 1))
    tensors |= {name: TensorInfo("F32", ()) for name in (*NAMES, *BESIDE_WEIGHTS)}
    row = TRANSFORMS_BY_MODULE[module]
    config = {"num_hidden_layers": 1, "num_attention_heads": 1, "qk_nope_head_dim": 64}
    plan = make_from_tensors(tensors, row, config, Serving("bfloat16", "bfloat16"), direct=True)
    # Names are those of the row's releases, some of which nest the language model.
    found = {name.removeprefix("language_model.") for name in plan.drops}
    assert found == {*NAMES, *BESIDE_WEIGHTS}


@pytest.mark.parametrize("fp8", [None, Fp8()])
def test_a_load_with_them_is_the_load_without(fp8: Fp8 | None, tmp_path: Path):
    plain, scaled = build(fp8=fp8), build(fp8=fp8)
    for name in (*NAMES, *BESIDE_WEIGHTS):
        scaled.tensors[name.replace("model.", PREFIX)] = torch.tensor(0.5)
    with vllm_moe_compat.applied():
        wanted = parameters(load(plain.write(tmp_path / "plain")))
        with planned_loads() as plans:
            found = parameters(load(scaled.write(tmp_path / "scaled")))
        check_agreement(tmp_path / "scaled", plans, None)
    assert same_bits(found, wanted)
