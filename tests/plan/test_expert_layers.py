"""The bytes of experts that are read from headers are those of the loaded model's experts."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_config, load_model, quantize_model, save_config, save_model

import vllm_moe_compat
from parity.mlx_families import FAMILIES as MLX_FAMILIES
from parity.test_without_transformers import checkpoint
from support.checkpoints import Fp8, Sizes, build
from support.loading import load, parameters
from vllm_moe_compat.checkpoint.file_stamps import FileStamps
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.plan.expert_layers import planned_experts
from vllm_moe_compat.plan.make import make
from vllm_moe_compat.plan.planned_load import Headers, PlannedLoad, read_headers_of
from vllm_moe_compat.plan.serving import serving
from vllm_moe_compat.probes import recipes

SIZES = Sizes(hidden=128, intermediate=64)


def plan(path: Path, device: str = "gpu", dtype: str | None = None) -> PlannedLoad:
    planned = make(read_headers_of(path), load_config(path), serving(device, dtype))
    planned.refuse()
    return planned


def held(path: Path) -> dict[str, int]:
    """Bytes of the experts in the loaded model, by module."""
    found: dict[str, int] = defaultdict(int)
    with vllm_moe_compat.applied():
        for name, array in parameters(load(path)).items():
            if ".switch_mlp." in name:
                found[name.partition(".switch_mlp.")[0] + ".switch_mlp"] += array.nbytes
    mx.clear_cache()
    return found


@pytest.mark.parametrize(
    ("form", "fp8", "setting"),
    [
        ("per-expert", None, "4bit"),
        ("per-expert", Fp8(), "none"),
        ("combined", None, "none"),
        ("combined", Fp8(), "mxfp8"),
    ],
)
def test_each_layer_has_the_bytes_of_its_experts(form, fp8, setting, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", setting)
    path = build(form, fp8, sizes=SIZES, mtp=True, vision=True).write(tmp_path)
    found = planned_experts(plan(path), setting, "gpu")
    assert {layer.nbytes for layer in found.layers} == set(held(path).values())
    assert [layer.experts for layer in found.layers] == [4] * 4
    assert found.estimated == sum(layer.nbytes for layer in found.layers)
    weights = 3 * 128 * 64 * 4
    scales = 4 * 2 * (3 if form == "per-expert" else 2)
    stored = weights * 2 if fp8 is None else weights + scales
    assert {layer.stored for layer in found.layers} == {stored}


def test_a_folder_of_mlx_counts_words_scales_and_biases(tmp_path):
    with vllm_moe_compat.applied():
        model, config = load_model(build("per-expert", sizes=SIZES).write(tmp_path / "release"))
    model, config = quantize_model(model, config, group_size=64, bits=4)
    save_model(tmp_path / "mlx", model)
    save_config(config, tmp_path / "mlx" / "config.json")
    found = planned_experts(plan(tmp_path / "mlx"), "none", "gpu")
    assert [layer.nbytes for layer in found.layers] == list(held(tmp_path / "mlx").values())
    assert [layer.stored for layer in found.layers] == [layer.nbytes for layer in found.layers]


def test_float_experts_count_in_float32_on_the_cpu(tmp_path):
    path = build("per-expert", sizes=SIZES).write(tmp_path)
    found = planned_experts(plan(path, "cpu", "bfloat16"), "none", "cpu")
    assert {layer.nbytes for layer in found.layers} == {3 * 128 * 64 * 4 * 4}
    assert found.estimated == 4 * 3 * 128 * 64 * 4 * 2


@pytest.mark.parametrize("name", recipes.families())
def test_in_every_family_all_experts_are_found(name):
    recipe = recipes.families()[name].release
    tensors = {n: TensorInfo("F32", shape) for n, shape in recipe.tensors.items()}
    if "lm_head.weight" in tensors or "language_model.lm_head.weight" in tensors:
        # Whether a head equals the embeddings, as tied ones may, is asked of the files.
        recipe = replace(recipe, config=recipe.config | {"tie_word_embeddings": False})
    headers = Headers(Path(), tensors, None, FileStamps(), (), extern=False)
    planned = make(headers, recipe.config, serving("gpu", "float32"))
    assert planned.layout is not None
    names = {n for block in planned.layout.experts for n in block.names()}
    found = planned_experts(planned, "none", "gpu")
    assert found.estimated == sum(4 * math.prod(tensors[n].shape) for n in names)
    assert len(found.layers) == len(planned.layout.experts)


def test_packed_experts_that_a_module_makes_together_are_refused_by_name():
    (family,) = (found for found in MLX_FAMILIES if found.module == "muse_spark")
    released = checkpoint(family, "published")
    tensors: dict[str, TensorInfo] = {}
    for name, value in released.tensors.items():
        shape = tuple(value.shape)
        tensors[name] = TensorInfo("F32", shape)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, rows, columns = shape
            tensors[name] = TensorInfo("U8", (count, rows, columns // 2))
            grid = (count, rows, columns // 16)
            tensors[f"{name}_weight_scale"] = TensorInfo("F8_E4M3", grid)
            shared = (count, 2) if "gate_up" in name else (count,)
            tensors[f"{name}_weight_scale_2"] = TensorInfo("F32", shared)
    described = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    config = released.config | {"quantization_config": described}
    headers = Headers(Path(), tensors, None, FileStamps(), (), extern=False)
    planned = make(headers, config, serving("gpu", None))
    planned.refuse()
    with pytest.raises(UnsupportedCheckpointError, match=r"from .*gate_up_proj.* all together"):
        planned_experts(planned, "none", "gpu")
