"""A prediction head has the tensors that its layer would have in the target."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, Cell, applies, build
from parity.fp8 import widen
from support.checkpoint_heads import add_head, layer_count
from support.loading import same_bits
from vllm_moe_compat.errors import (
    CompatError,
    InsufficientMemoryError,
    LayoutError,
    UnsupportedCheckpointError,
)
from vllm_moe_compat.families.prediction_heads import HEADS_BY_MODULE
from vllm_moe_compat.load import memory
from vllm_moe_compat.load.prediction_heads import HeadParts, load_heads
from vllm_moe_compat.load.report import last_report

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

DENSE_HEADS = ("ernie4_5_moe", "exaone_moe", "step3p7")
"""Families whose head is like the target's first layer; those of others are like the last."""
SHIFTED = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "step3p5")
DAILY = {
    ("qwen3_5_moe", "block FP8 128"),
    ("qwen3_5_moe", "int4"),
    ("qwen3_5", "release"),
    ("qwen3_next", "release"),
    ("qwen3_next", "block FP8 combined"),
    ("deepseek_v3", "GPTQ"),
    ("glm4_moe", "NVFP4"),
    ("ernie4_5_moe", "release"),
    ("exaone_moe", "per-tensor FP8"),
    ("kimi_k25", "combined"),
    ("step3p7", "release"),
    ("minimax_m3_vl", "block FP8"),
}
FORMS = (
    "saved",
    "release",
    "per-expert",
    "combined",
    "block FP8",
    "block FP8 128",
    "block FP8 combined",
    "per-tensor FP8",
    "int4",
    "int8 W8A8",
    "GPTQ",
    "AWQ",
    "NVFP4",
    "ModelOpt NVFP4 combined",
    "MXFP4",
)
ALIKE = [
    name
    for name in FAMILIES
    if FAMILIES[name].module in HEADS_BY_MODULE
    and name == FAMILIES[name].base
    and FAMILIES[name].module not in ("mimo_v2_flash", "nemotron_h")
]
CELLS = [
    pytest.param(
        family,
        form,
        marks=() if (family, form) in DAILY else pytest.mark.full,
        id=f"{family} {form}",
    )
    for family in ALIKE
    for form in FORMS
    if applies(FAMILIES[family], FORM_BY_NAME[form])
    and (family, form) != ("kimi_k25", "saved")  # Its layers have another name there.
]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def cell_of(family: str, form: str, **options: Any) -> tuple[Cell, int, dict[str, torch.Tensor]]:
    """Return a checkpoint with a head, the number of the layer it equals, and the other parts."""
    cell = build(FAMILIES[family], FORM_BY_NAME[form])
    cell.checkpoint.config = deepcopy(cell.checkpoint.config)
    layer = 0 if family in DENSE_HEADS else layer_count(cell.checkpoint.tensors) - 1
    apart = add_head(cell.checkpoint, FAMILIES[family].module, layer, **options)
    return cell, layer, apart


def heads(folder: Path, dtype: str = "float32") -> HeadParts:
    return load_heads(folder, dtype, lambda model: None)


def parameters(module: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


@pytest.mark.parametrize(("family", "form"), CELLS)
def test_the_layer_is_the_targets_own(family: str, form: str, tmp_path: Path):
    cell, layer, apart = cell_of(family, form)
    folder = cell.write(tmp_path)
    target, _ = mlx_lm.utils.load_model(folder)  # Strict: the head is left out.
    found = heads(folder)
    assert same_bits(parameters(found.decoder.layers[0]), parameters(target.layers[layer]))
    assert len(found.model.layers) == 1
    shift = 1.0 if FAMILIES[family].module in SHIFTED else 0.0
    for part in ("embedding_norm", "hidden_norm", *(["norm"] if "norm" in apart else [])):
        wanted = apart[part].numpy() + shift
        assert np.array_equal(np.array(getattr(found, part).weight), wanted), part
    assert np.array_equal(np.array(found.join.weight), apart["join"].numpy())
    assert (found.norm is None) == ("norm" not in apart)
    assert found.embedding is None
    assert found.output is None


@pytest.mark.parametrize(
    ("family", "form"),
    [("qwen3_5_moe", "int4"), ("qwen3_next", "release"), ("deepseek_v3", "block FP8 128")],
)
def test_the_layer_is_the_targets_own_in_half_precision(
    family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
    cell, layer, _ = cell_of(family, form)
    folder = cell.write(tmp_path)
    target, _ = mlx_lm.utils.load_model(folder)
    found = heads(folder, "bfloat16")
    assert same_bits(parameters(found.decoder.layers[0]), parameters(target.layers[layer]))


@pytest.mark.parametrize(
    "form",
    [
        "release",
        *(pytest.param(f, marks=pytest.mark.full) for f in FORMS if f != "release"),
    ],
)
def test_a_sliding_layer_with_a_dense_mlp_is_like_two_layers_of_the_target(
    form: str, tmp_path: Path
):
    cell = build(FAMILIES["mimo_v2_flash"], FORM_BY_NAME[form])
    add_head(cell.checkpoint, "mimo_v2_flash", 1, mlp=0)
    folder = cell.write(tmp_path)
    target, _ = mlx_lm.utils.load_model(folder)
    found = heads(folder)
    (layer,) = found.model.layers
    dense, sliding = target.layers
    assert same_bits(parameters(layer.mlp), parameters(dense.mlp))
    assert layer.is_sliding_window
    for part in ("self_attn", "input_layernorm", "post_attention_layernorm"):
        assert same_bits(parameters(layer[part]), parameters(sliding[part])), part
    assert found.decoder(mx.zeros((1, 20, 64)), found.model.make_cache()).shape == (1, 20, 64)


@pytest.mark.parametrize(
    "form",
    [
        "block FP8",
        *(
            pytest.param(form, marks=pytest.mark.full)
            for form in FORMS
            if form != "block FP8" and applies(FAMILIES["nemotron_h"], FORM_BY_NAME[form])
        ),
    ],
)
def test_layers_of_a_head_of_several_are_the_targets_own(form: str, tmp_path: Path):
    cell = build(FAMILIES["nemotron_h"], FORM_BY_NAME[form])
    cell.checkpoint.config = cell.checkpoint.config | {"mtp_hybrid_override_pattern": "*E"}
    add_head(cell.checkpoint, "nemotron_h", (2, 1))
    folder = cell.write(tmp_path)
    target, _ = mlx_lm.utils.load_model(folder)
    first, second = heads(folder).model.layers
    assert same_bits(parameters(first), parameters(target.layers[2]))
    assert same_bits(parameters(second), parameters(target.layers[1]))


def test_the_parts_compute(tmp_path: Path):
    cell, _, _ = cell_of("qwen3_5_moe", "release")
    found = heads(cell.write(tmp_path))
    joined = found.join(mx.random.normal((2, 5, 128)))
    cache = found.model.make_cache()
    whole = found.decoder(joined)
    apart = [found.decoder(joined[:, at : at + 1], cache) for at in range(5)]
    assert found.norm is not None
    assert whole.shape == (2, 5, 64)
    assert np.allclose(np.array(whole), np.array(mx.concatenate(apart, 1)), atol=1e-5)


def test_a_head_of_several_layers_is_whole_or_refused(tmp_path: Path):
    cell = build(FAMILIES["nemotron_h"], FORM_BY_NAME["release"])
    add_head(cell.checkpoint, "nemotron_h", (2, 1))
    whole = dict(cell.checkpoint.tensors)
    for number, (error, lost, added) in enumerate(
        (
            (LayoutError, "mtp.layers.0.mixer.q_proj.weight", ""),
            (LayoutError, "mtp.layers.1.mixer.gate.weight", ""),
            (LayoutError, "mtp.layers.1.final_layernorm.weight", ""),
            (UnsupportedCheckpointError, "", "mtp.layers.2.norm.weight"),
            (UnsupportedCheckpointError, "", "mtp.fc.weight"),
        )
    ):
        cell.checkpoint.tensors = {name: value for name, value in whole.items() if name != lost}
        if added:
            cell.checkpoint.tensors[added] = whole["mtp.layers.0.norm.weight"].clone()
        name = (lost or added).removesuffix(".norm.weight")
        refused(cell.write(tmp_path / str(number)), error, name)


def refused(folder: Path, error: type[CompatError], *words: str) -> None:
    with pytest.raises(error) as caught:
        heads(folder)
    for word in (*words, "--speculative-config without mtp"):
        assert word in str(caught.value), str(caught.value)
    mlx_lm.utils.load_model(folder)  # Nobody asks for the head.


HEAD = "mtp.layers.0."
LOST = (
    "mtp.fc.weight",
    "mtp.norm.weight",
    "mtp.pre_fc_norm_hidden.weight",
    f"{HEAD}self_attn.o_proj.weight",
    f"{HEAD}input_layernorm.weight",
    f"{HEAD}mlp.gate.weight",
    f"{HEAD}mlp.experts.2.up_proj.weight",
    f"{HEAD}mlp.shared_expert.down_proj.weight",
)


@pytest.mark.parametrize("name", LOST)
def test_a_head_without_one_of_its_tensors_is_refused(name: str, tmp_path: Path):
    cell, _, _ = cell_of("qwen3_next", "release")
    del cell.checkpoint.tensors[name]
    parts = name.split(".")
    refused(cell.write(tmp_path), LayoutError, ".".join(parts[:2]), parts[-2])


@pytest.mark.parametrize(
    "begin", [f"{HEAD}mlp.", f"{HEAD}self_attn.", HEAD, "mtp.layers.0.mlp.experts"]
)
def test_a_head_without_a_part_of_its_layer_is_refused(begin: str, tmp_path: Path):
    cell, _, _ = cell_of("qwen3_next", "release")
    for name in [name for name in cell.checkpoint.tensors if name.startswith(begin)]:
        del cell.checkpoint.tensors[name]
    refused(cell.write(tmp_path), LayoutError, HEAD, "missing")


@pytest.mark.parametrize(
    "name",
    ["mtp.fc.weight", f"{HEAD}self_attn.q_proj.weight", f"{HEAD}mlp.experts.1.up_proj.weight"],
)
def test_a_head_with_another_shape_is_refused(name: str, tmp_path: Path):
    cell, _, _ = cell_of("qwen3_next", "release")
    cell.checkpoint.tensors[name] = cell.checkpoint.tensors[name][:-8].clone()
    refused(cell.write(tmp_path), LayoutError, name.split(".weight")[0].split(".experts")[0])


@pytest.mark.parametrize("name", ["mtp.norm.weight", f"{HEAD}input_layernorm.weight"])
def test_a_head_of_integers_is_refused(name: str, tmp_path: Path):
    cell, _, _ = cell_of("qwen3_next", "release")
    cell.checkpoint.tensors[name] = cell.checkpoint.tensors[name].to(torch.int32)
    refused(cell.write(tmp_path), LayoutError, name, "I32")


def test_scales_that_a_head_lacks_are_refused(tmp_path: Path):
    cell, _, _ = cell_of("deepseek_v3", "block FP8")
    name = "model.layers.2.self_attn.o_proj.weight_scale_inv"
    del cell.checkpoint.tensors[name]
    refused(cell.write(tmp_path), LayoutError, "model.layers.2.self_attn.o_proj")


def test_a_tensor_that_no_head_has_is_refused(tmp_path: Path):
    cell, _, _ = cell_of("qwen3_5_moe", "release")
    cell.checkpoint.tensors["mtp.adapter.weight"] = torch.zeros(4, 4)
    refused(cell.write(tmp_path), UnsupportedCheckpointError, "mtp.adapter.weight", "not known")


def test_a_tensor_that_no_layer_has_is_refused(tmp_path: Path):
    cell, _, _ = cell_of("glm4_moe", "release")
    cell.checkpoint.tensors["model.layers.2.self_attn.sinks"] = torch.zeros(4)
    refused(cell.write(tmp_path), UnsupportedCheckpointError, "model.layers.2.self_attn.sinks")


def test_a_checkpoint_without_a_head_is_refused_when_one_is_asked_for(tmp_path: Path):
    cell = build(FAMILIES["deepseek_v3"], FORM_BY_NAME["release"])
    cell.checkpoint.config = deepcopy(cell.checkpoint.config)
    cell.checkpoint.config["num_nextn_predict_layers"] = 1
    refused(
        cell.write(tmp_path),
        UnsupportedCheckpointError,
        "no tensors of a prediction head",
        "is 1",
    )


def test_heads_of_an_unknown_family_are_refused_with_the_known_ones(tmp_path: Path):
    cell = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"])
    cell.checkpoint.tensors["model.mtp_layers.0.fc.weight"] = torch.zeros(8, 8)
    folder = cell.write(tmp_path)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        heads(folder)
    for word in ("qwen3_moe", "model.mtp_layers.0.fc.weight", *HEADS_BY_MODULE):
        assert word in str(caught.value)


def test_a_converted_folder_has_no_head(tmp_path: Path):
    cell = build(FAMILIES["qwen3_next"], FORM_BY_NAME["MLX form"])
    refused(cell.write(tmp_path), UnsupportedCheckpointError, "a folder in MLX's form never has")


def test_a_head_in_a_converted_folder_is_refused(tmp_path: Path):
    cell, _, _ = cell_of("deepseek_v3", "MLX form")
    refused(cell.write(tmp_path), UnsupportedCheckpointError, "converted")


@pytest.mark.parametrize("family", ["qwen3_5_moe", "deepseek_v3"])
def test_the_first_of_several_heads_is_used(family: str, tmp_path: Path):
    cell, _, _ = cell_of(family, "release")
    one = parameters(heads(cell.write(tmp_path / "one")).model)
    layer = layer_count(cell.checkpoint.tensors) - 1 if family == "qwen3_5_moe" else 0
    add_head(cell.checkpoint, FAMILIES[family].module, layer, index=1)
    assert same_bits(parameters(heads(cell.write(tmp_path / "two")).model), one)


@pytest.mark.parametrize("scheme", ["block FP8", "block FP8 128", "int4", "NVFP4"])
def test_a_plain_head_beside_a_quantised_target(scheme: str, tmp_path: Path):
    cell, layer, _ = cell_of("qwen3_5_moe", scheme)
    plain, _, _ = cell_of("qwen3_5_moe", "release")
    for name in [n for n in cell.checkpoint.tensors if n.startswith(HEAD)]:
        del cell.checkpoint.tensors[name]
    given = {n: t for n, t in plain.checkpoint.tensors.items() if n.startswith(HEAD)}
    cell.checkpoint.tensors |= given
    target, _ = mlx_lm.utils.load_model(plain.write(tmp_path / "plain"))
    found = heads(cell.write(tmp_path / "quantised"))
    assert same_bits(parameters(found.decoder.layers[0]), parameters(target.layers[layer]))


def test_a_quantised_head_beside_a_plain_target(tmp_path: Path):
    stored, layer, _ = cell_of("glm4_moe", "block FP8")
    cell, _, _ = cell_of("glm4_moe", "release")
    begin = "model.layers.2."
    target, _ = mlx_lm.utils.load_model(stored.write(tmp_path / "stored"))
    names = [n for n in cell.checkpoint.tensors if n.startswith(begin)]
    for name in [n for n in names if not any(p in n for p in ("norm", "eh_proj"))]:
        del cell.checkpoint.tensors[name]
    cell.checkpoint.tensors |= {
        n: t for n, t in stored.checkpoint.tensors.items() if n.startswith(begin)
    }
    cell.checkpoint.config["quantization_config"] = stored.checkpoint.config["quantization_config"]
    found = heads(cell.write(tmp_path / "head"))
    assert same_bits(parameters(found.decoder.layers[0]), parameters(target.layers[layer]))


def test_the_joining_projection_may_be_quantised(tmp_path: Path):
    cell, _, apart = cell_of("deepseek_v3", "block FP8")
    scale = torch.ldexp(torch.ones(2, 4), -torch.arange(8).reshape(2, 4))
    wide = widen(scale, (32, 32), 64, 128)
    weight = (apart["join"] / wide).to(torch.float8_e4m3fn)
    name = "model.layers.2.eh_proj.weight"
    cell.checkpoint.tensors[name] = weight
    cell.checkpoint.tensors[f"{name}_scale_inv"] = scale
    found = heads(cell.write(tmp_path))
    assert np.array_equal(np.array(found.join.weight), (weight.float() * wide).numpy())


def test_copies_of_embeddings_and_output_head_are_left_out(tmp_path: Path):
    cell, _, _ = cell_of("deepseek_v3", "release", copies=True)
    found = heads(cell.write(tmp_path))
    assert found.embedding is None
    assert found.output is None


@pytest.mark.parametrize("form", ["release", "block FP8"])
def test_a_heads_own_embeddings_and_output_head_are_used(form: str, tmp_path: Path):
    cell, _, _ = cell_of("deepseek_v3", form, copies=True)
    tensors = cell.checkpoint.tensors
    names = {"embedding": "model.layers.2.embed_tokens.weight"}
    names["output"] = "model.layers.2.shared_head.head.weight"
    for name in names.values():
        tensors[name] = tensors[name] + 0.25
    found = heads(cell.write(tmp_path))
    for part, name in names.items():
        assert np.array_equal(np.array(getattr(found, part).weight), tensors[name].float().numpy())


def test_a_fault_during_the_load_says_that_it_is_the_heads(tmp_path: Path):
    cell, _, _ = cell_of("glm4_moe_lite", "GPTQ")
    name = "model.layers.2.mlp.experts.3.down_proj.g_idx"
    cell.checkpoint.tensors[name] = cell.checkpoint.tensors[name].flip(0).clone()
    with pytest.raises(CompatError, match=r"the prediction head cannot be loaded: .* act order"):
        heads(cell.write(tmp_path))


def test_a_head_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cell, _, _ = cell_of("qwen3_5_moe", "block FP8 128")
    folder = cell.write(tmp_path)
    monkeypatch.setattr(memory, "device_memory", lambda: (100_000, 100_000))
    with pytest.raises(InsufficientMemoryError, match="the prediction head cannot be loaded"):
        heads(folder)


def test_only_the_head_is_read_and_the_report_stays_the_targets(tmp_path: Path):
    cell, _, _ = cell_of("qwen3_5_moe", "block FP8 128")
    folder = cell.write(tmp_path)
    target, _ = mlx_lm.utils.load_model(folder)
    report = last_report()
    before = mx.get_active_memory()
    found = heads(folder)
    held = mx.get_active_memory() - before
    assert found.weight_bytes <= held < 1.5 * found.weight_bytes
    assert last_report() is report
    assert len(target.layers) > 1


@pytest.mark.compat
@pytest.mark.parametrize("family", ALIKE)
def test_mlx_lm_makes_no_head(family: str, tmp_path: Path):
    """If it does, `families/prediction_heads.py` has a row that is not needed any more."""
    cell, _, _ = cell_of(family, "release")
    config = cell.checkpoint.config
    text = config.get("text_config", config)
    text |= {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1}
    cell.write(tmp_path)
    model, _ = mlx_lm.utils.load_model(tmp_path)
    names = parameters(model)
    assert len(model.layers) == text["num_hidden_layers"]
    assert not [name for name in names if any(w in name for w in ("mtp", "eh_proj", "enorm"))]
