"""From any layout to any other, and back: not a bit is lost."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from support.loading import same_bits
from support.rewriting import layout_to
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.errors import CheckpointFileError, SettingError, UnsupportedCheckpointError
from vllm_moe_compat.execute import stack
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.row import COMBINED, PER_EXPERT, TRANSPOSED, W123, Row
from vllm_moe_compat.rewrite.planner import plan_rewrite
from vllm_moe_compat.rewrite.run_rewrite import rewrite
from vllm_moe_compat.rewrite.written_layout import LAYOUTS, STACKED, WrittenLayout

EXPERTS = 3
SIZES = {"plain": (8, 12), "H = 2I": (8, 16), "H = I": (8, 8), "2H = I": (16, 8)}
MODULES = (
    "qwen3_5_moe",  # mlp.switch_mlp
    "mixtral",  # block_sparse_moe.switch_mlp, w1/w2/w3
    "jamba",  # feed_forward.switch_mlp
    "nemotron_h",  # mixer.switch_mlp, two projections
    "dots1",  # mlp.experts
    "llama4",  # feed_forward.experts
    "gemma4_text",  # experts.switch_glu
    "granitemoe",  # input_linear and output_linear
    "gpt_oss",  # interleaved, transposed, biases
    "phixtral",  # moe.mlp, two projections, biases
    "step3p5",  # moe
    "lfm2_moe",  # either spelling
)
BIASED = ("gpt_oss", "phixtral")
BLOCK = (4, 4)

Tensors = dict[str, mx.array]


def row_of(module: str) -> Row:
    return TRANSFORMS_BY_MODULE[f"mlx_lm.models.{module}"]


def config(hidden: int) -> dict[str, Any]:
    entry = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    return {"num_experts": EXPERTS, "hidden_size": hidden, "quantization_config": entry}


def exact(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Numbers that E4M3 holds whatever the block is: 448 times powers of two."""
    powers = 2.0 ** rng.integers(-6, 4, shape)
    return (powers * 1.75 * rng.choice([-1, 1], shape)).astype(np.float32)


def stacked(
    module: str, inner: int, hidden: int, dtype: mx.Dtype = mx.float32, layers: int = 2
) -> Tensors:
    """Layers of experts in MLX's form, and a router."""
    row = row_of(module)
    assert row.moe is not None
    rng = np.random.default_rng(0)
    start = {"nemotron_h": "backbone.layers.", "phixtral": "transformer.h."}
    found: Tensors = {}
    for layer in range(layers):
        root = f"{start.get(module, 'model.layers.')}{layer}.{row.moe.target}"
        for part, name in row.moe.projections:
            shape = (EXPERTS, hidden, inner) if part == "down" else (EXPERTS, inner, hidden)
            found[f"{root}.{name}.weight"] = mx.array(exact(shape, rng)).astype(dtype)
            if module in BIASED:
                bias = rng.standard_normal(shape[:2]).astype(np.float32)
                found[f"{root}.{name}.bias"] = mx.array(bias).astype(dtype)
    found["lm_head.weight"] = mx.ones((4, hidden), dtype=dtype)
    return found


FORMS = {
    **{layout: layout_to(layout) for layout in LAYOUTS},
    "w1/w2/w3": layout_to(PER_EXPERT, W123),
    **{f"{layout}, block FP8": layout_to(layout, block=BLOCK) for layout in LAYOUTS},
    **{
        f"{layout}, per-row FP8": layout_to(layout, block=(1, 0))
        for layout in (PER_EXPERT, COMBINED)
    },
    "per-expert, per-tensor FP8": layout_to(PER_EXPERT, block=(0, 0)),
    "combined, E8M0": layout_to(COMBINED, block=BLOCK, e8m0=True),
}


def forms_of(module: str, inner: int, hidden: int) -> list[str]:
    row = row_of(module)
    assert row.moe is not None
    names = list(FORMS)
    if module == "phixtral":
        names = [n for n in names if "combined" not in n]
    if not row.moe.gated:
        names = [n for n in names if inner != hidden or TRANSPOSED not in n]
    return names


def change(tensors: Tensors, module: str, hidden: int, form: WrittenLayout, dtype: str) -> Tensors:
    given = dict(tensors)
    found = dict(rewrite(given, row_of(module), config(hidden), form, dtype=dtype))
    assert not given
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("module", MODULES)
def test_any_layout_becomes_any_other_and_comes_back(module: str, size: str, dtype: str):
    inner, hidden = SIZES[size]
    names = forms_of(module, inner, hidden)
    if dtype == "bfloat16":  # the same paths; one form of each kind is enough
        names = [n for n in names if n in LAYOUTS or n.endswith("block FP8")][::2]
    base = stacked(module, inner, hidden, getattr(mx, dtype), layers=1)
    written = {n: change(base, module, hidden, FORMS[n], dtype) for n in names}
    for first in names:
        for second in names:
            there = change(written[first], module, hidden, FORMS[second], dtype)
            assert same_bits(there, written[second]), (first, second)


def test_the_names_are_those_that_authors_use():
    heads = {
        "qwen3_5_moe": "mlp.experts.gate_up_proj",
        "granitemoe": "block_sparse_moe.input_linear.weight",
        "nemotron_h": "mixer.experts.up_proj",
        "step3p5": "moe.experts.gate_up_proj",
    }
    for module, name in heads.items():
        found = change(stacked(module, 8, 12), module, 12, FORMS["combined"], "float32")
        assert any(key.endswith(f".layers.0.{name}") for key in found), found.keys()
    singles = {
        "mixtral": "block_sparse_moe.experts.2.w3.weight",
        "phixtral": "moe.mlp.2.fc2.bias",
        "lfm2_moe": "feed_forward.experts.2.w1.weight",
        "granitemoe": "block_sparse_moe.experts.2.up_proj.weight",
    }
    for module, name in singles.items():
        found = change(stacked(module, 8, 12), module, 12, layout_to(), "float32")
        assert any(key.endswith(f".0.{name}") for key in found), found.keys()
    form = layout_to(COMBINED, home="mlp.experts")
    found = change(stacked("mixtral", 8, 12), "mixtral", 12, form, "float32")
    assert "model.layers.0.mlp.experts.down_proj" in found


def test_what_is_in_the_wanted_form_is_the_very_same_array():
    for name, form in FORMS.items():
        given = change(stacked("qwen3_5_moe", 8, 12), "qwen3_5_moe", 12, form, "float32")
        found = change(given, "qwen3_5_moe", 12, form, "float32")
        assert found.keys() == given.keys()
        assert all(found[key] is given[key] for key in given), name


def random_fp8(module: str, inner: int, hidden: int) -> Tensors:
    """FP8 as one matrix per expert, with scales that no quantiser would choose."""
    rng = np.random.default_rng(1)
    base = change(stacked(module, inner, hidden), module, hidden, layout_to(block=BLOCK), "float32")
    for name, array in base.items():
        if name.endswith("_scale_inv"):
            noise = rng.uniform(0.001, 0.01, array.shape).astype(np.float32)
            base[name] = mx.array(noise).astype(mx.bfloat16)
    return base


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_with_the_same_blocks_is_moved_and_never_multiplied(layout: str):
    given = random_fp8("qwen3_5_moe", 8, 12)
    form = layout_to(layout, block=BLOCK)
    found = change(given, "qwen3_5_moe", 12, form, "float32")
    assert sum(name.endswith("_scale_inv") for name in found) * 2 == len(found) - 1
    assert same_bits(change(found, "qwen3_5_moe", 12, layout_to(block=BLOCK), "float32"), given)
    wanted = change(given, "qwen3_5_moe", 12, layout_to(), "float32")
    assert same_bits(change(found, "qwen3_5_moe", 12, layout_to(), "float32"), wanted)


def test_blocks_that_gate_and_up_would_share_are_quantised_anew():
    given = random_fp8("qwen3_5_moe", 6, 12)
    found = change(given, "qwen3_5_moe", 12, layout_to(COMBINED, block=BLOCK), "float32")
    scale = found["model.layers.0.mlp.experts.gate_up_proj_scale_inv"]
    assert (scale.shape, scale.dtype) == ((EXPERTS, 3, 3), mx.float32)
    wanted = change(given, "qwen3_5_moe", 12, layout_to(STACKED), "float32")
    back = change(found, "qwen3_5_moe", 12, layout_to(STACKED), "float32")
    for name, array in wanted.items():
        assert mx.abs(back[name] - array).max().item() <= mx.abs(array).max().item() / 16


def test_interleaved_rows_move_with_scales_of_their_own_only():
    base = stacked("gpt_oss", 8, 12)
    for block, moved in (((1, 0), True), (BLOCK, False)):
        given = change(base, "gpt_oss", 12, layout_to(STACKED, block=block), "float32")
        infos = {n: _info(n, a) for n, a in given.items()}
        row = row_of("gpt_oss")
        layout = detect(infos, config(12), row.ignored)
        plan = plan_rewrite(layout, row, config(12), layout_to(COMBINED, block=block))
        fused = [step for step in plan.steps if step.writes[0].weights[0].endswith("gate_up_proj")]
        assert [step.stays_stored for step in fused] == [moved, moved]


def _info(name: str, array: mx.array) -> TensorInfo:
    names = {mx.uint8: "F8_E4M3", mx.float32: "F32"}
    return TensorInfo(names[array.dtype], tuple(array.shape))


def test_experts_that_only_change_names_or_blocks_go_one_at_a_time():
    given = random_fp8("mixtral", 8, 12)
    infos = {
        n: _info(n, a) if a.dtype == mx.uint8 else TensorInfo("F32", tuple(a.shape))
        for n, a in given.items()
    }
    row = row_of("mixtral")
    layout = detect(infos, config(12), row.ignored)
    for form in (
        layout_to(),
        layout_to(block=(2, 2)),
        layout_to(spelling=("gate_proj", "up_proj", "down_proj")),
    ):
        plan = plan_rewrite(layout, row, config(12), form)
        assert len(plan.steps) == 2 * 3 * EXPERTS
        assert all(len(b.weights) == 1 for step in plan.steps for b in step.builds)


def test_sources_leave_as_they_are_read_and_targets_are_handed_out():
    given = stacked("qwen3_5_moe", 8, 12)
    names = set(given)
    stream = rewrite(given, row_of("qwen3_5_moe"), config(12), layout_to(block=BLOCK))
    assert set(given) == names
    name, array = next(stream)
    assert ".layers.0.mlp.experts.0." in name
    assert array.shape in {(8, 12), (12, 8)}
    assert 4 <= len(given) < len(names)
    del array
    assert sum(1 for _ in stream) == 2 * 3 * EXPERTS * 2
    assert not given


def test_other_projections_are_quantised_where_they_were_or_where_asked():
    row = row_of("qwen3_5_moe")
    rng = np.random.default_rng(2)
    linear = "model.layers.0.self_attn.q_proj.weight"
    given = stacked("qwen3_5_moe", 8, 12) | {linear: mx.array(exact((8, 12), rng))}
    fp8 = layout_to(STACKED, block=BLOCK)
    left = dict(rewrite(dict(given), row, config(12), fp8))
    assert left[linear] is given[linear]
    asked = dict(
        rewrite(
            dict(given), row, config(12), fp8, linear=lambda name: name.endswith("q_proj.weight")
        )
    )
    assert asked[linear].dtype == mx.uint8
    assert asked[f"{linear}_scale_inv"].shape == (2, 3)
    again = dict(rewrite(dict(asked), row, config(12), layout_to(COMBINED, block=(8, 12))))
    assert again[f"{linear}_scale_inv"].shape == (1, 1)
    asked[linear.replace("weight", "input_scale")] = mx.ones(())
    back = dict(rewrite(asked, row, config(12), layout_to(STACKED), dtype="float32"))
    assert same_bits(back, given)


def test_norms_that_are_stored_less_one_follow_the_experts():
    row = row_of("qwen3_next")
    rng = np.random.default_rng(3)
    own = {
        "model.norm.weight": mx.array(rng.integers(-8, 8, 12).astype(np.float32) / 16),
        "model.layers.0.linear_attn.conv1d.weight": mx.array(exact((6, 1, 4), rng)),
    }
    given = change(stacked("qwen3_next", 8, 12), "qwen3_next", 12, layout_to(), "float32") | own
    kept = dict(rewrite(dict(given), row, config(12), layout_to(COMBINED), dtype="float32"))
    mlx = dict(rewrite(dict(given), row, config(12), layout_to(STACKED), dtype="float32"))
    for name, array in own.items():
        assert kept[name] is array
    assert mx.array_equal(mlx["model.norm.weight"], own["model.norm.weight"] + 1)
    assert mlx["model.layers.0.linear_attn.conv1d.weight"].shape == (6, 4, 1)
    back = dict(rewrite(mlx, row, config(12), layout_to(), dtype="float32"))
    assert same_bits(back, given)


def test_what_the_module_ignores_is_left_to_the_caller():
    given = stacked("qwen3_5_moe", 8, 12) | {"mtp.fc.weight": mx.ones((2, 2))}
    found = dict(rewrite(given, row_of("qwen3_5_moe"), config(12), layout_to()))
    assert list(given) == ["mtp.fc.weight"]
    assert "mtp.fc.weight" not in found


def test_a_dense_module_only_changes_its_fp8():
    row, name = row_of("qwen3"), "model.layers.0.mlp.up_proj.weight"
    rng = np.random.default_rng(4)
    given = {name: mx.array(exact((8, 12), rng)), "model.norm.weight": mx.ones(12)}
    fp8 = dict(
        rewrite(dict(given), row, {}, layout_to(block=(8, 12)), linear=lambda n: "norm" not in n)
    )
    assert fp8[name].dtype == mx.uint8
    assert same_bits(dict(rewrite(fp8, row, {}, layout_to(), dtype="float32")), given)


@pytest.mark.parametrize(
    ("module", "form", "words"),
    [
        ("phixtral", lambda: layout_to(COMBINED), "experts under moe.mlp cannot be written"),
        ("qwen3_5_moe", lambda: layout_to("diagonal"), "layout is 'diagonal'"),
        ("qwen3_5_moe", lambda: layout_to(spelling=("a", "b", "c")), "spelling has 'a'"),
        ("qwen3_5_moe", lambda: layout_to(spelling=("fc1", "fc2")), "names of gate, up, down"),
        ("qwen3_5_moe", lambda: layout_to(block=(-1, 4)), "block is"),
        ("qwen3_5_moe", lambda: layout_to(home="elsewhere"), "home is 'elsewhere'"),
        ("nemotron_h", lambda: layout_to(TRANSPOSED), "does not show whether it is transposed"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(module, form, words):
    given = stacked(module, 8, 8)
    names = set(given)
    with pytest.raises((SettingError, UnsupportedCheckpointError), match=words):
        rewrite(given, row_of(module), config(8), form())
    assert set(given) == names


def test_packed_experts_are_refused():
    given = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": mx.zeros((3, 4), dtype=mx.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_scales": mx.zeros((3, 1), dtype=mx.uint8),
    }
    with pytest.raises(UnsupportedCheckpointError, match="packed"):
        rewrite(given, row_of("gpt_oss"), config(8), layout_to())


def test_a_source_that_cannot_be_read_is_named():
    given = random_fp8("qwen3_5_moe", 8, 12)
    infos = {
        n: TensorInfo("F8_E4M3" if a.dtype == mx.uint8 else "BF16", tuple(a.shape), "x.safetensors")
        if n != "lm_head.weight"
        else TensorInfo("F32", tuple(a.shape))
        for n, a in given.items()
    }
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    given[name] = given[name][:, :3]
    stream = rewrite(given, row_of("qwen3_5_moe"), config(12), layout_to(STACKED), tensors=infos)
    with pytest.raises(CheckpointFileError, match=r"x\.safetensors: .*up_proj"):
        list(stream)


@pytest.mark.parametrize(
    "form", [layout_to(), layout_to(COMBINED), layout_to(COMBINED, block=(64, 64))]
)
def test_what_is_held_at_once_is_one_step(form: WrittenLayout, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 2**18)
    row, layers, inner, hidden = row_of("qwen3_5_moe"), 6, 128, 256
    entry = config(hidden) | {"quantization_config": {"weight_block_size": [128, 128]}}
    given: Tensors = {}
    for layer in range(layers):
        for e in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
                key = f"model.layers.{layer}.mlp.experts.{e}.{name}.weight"
                given[key] = mx.full(shape, 56, dtype=mx.uint8)
                given[f"{key}_scale_inv"] = mx.ones((shape[0] // 128, shape[1] // 128))
    mx.eval(given)
    gc.collect()
    mx.clear_cache()
    step = EXPERTS * 2 * inner * hidden * 4  # gate and up of a layer, in float32
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _, array in rewrite(given, row, entry, form, dtype="float32"):
        mx.eval(array)
        del array
    assert mx.get_peak_memory() - before < 3.5 * step
    assert mx.get_active_memory() < before - layers * step // 8
