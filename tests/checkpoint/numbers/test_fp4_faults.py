"""FP4 that contradicts itself or its config is refused before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx_lm.utils
import pytest
import torch

import vllm_moe_compat
from parity.verdict import judge
from support.agreement import check_agreement, planned_loads
from support.fp4 import LAYER, cell
from support.loading import load
from vllm_moe_compat.load.report import last_report

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.fixture(autouse=True)
def _hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


Q = f"{LAYER}.self_attn.q_proj.weight"
E = f"{LAYER}.mlp.experts.2.up_proj.weight"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, str], None]


def drop(ending: str) -> Change:
    return lambda tensors, name: tensors.pop(name + ending) is None


def put(ending: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: Tensors, name: str) -> None:
        tensors[name + ending] = make(tensors[name + ending])

    return change


MALFORMED: dict[str, tuple[str, Change, str]] = {
    "no scale": ("NVFP4", drop("_scale"), "is NVFP4 without a scale, expected weight_scale"),
    "no global scale": ("NVFP4", drop("_global_scale"), "is NVFP4 without a global scale"),
    "no second scale": ("ModelOpt NVFP4", drop("_scale_2"), "is NVFP4 without a global scale"),
    "no bytes": ("NVFP4", drop("_packed"), "scales a weight that is missing"),
    "no bytes of ModelOpt": ("ModelOpt NVFP4", drop(""), "scales a weight that is missing"),
    "groups of 32": (
        "NVFP4",
        put("_scale", lambda t: t[:, ::2]),
        r"_scale has the shape \[\d+, 2\] for NVFP4 bytes of \[\d+, 32\], expected \[\d+, 4\]",
    ),
    "MXFP4 in groups of 16": (
        "MXFP4",
        put("_scale", lambda t: t.repeat_interleave(2, -1)),
        r"_scale has the shape \[\d+, 4\] for MXFP4 bytes",
    ),
    "odd columns": ("NVFP4", put("_packed", lambda t: t[:, :-1]), "62 columns in pairs"),
    "flat bytes": ("NVFP4", put("_packed", lambda t: t.flatten()), "is NVFP4 of shape"),
    "float scales": ("NVFP4", put("_scale", torch.Tensor.float), "holds F32 scales of packed"),
    "a global scale per row": (
        "NVFP4",
        put("_global_scale", lambda t: t.repeat(64)),
        r"is F32 of shape \[64\] for NVFP4 bytes .* expected one float for a matrix",
    ),
    "an integer global scale": (
        "ModelOpt NVFP4",
        put("_scale_2", lambda t: t.int()),
        r"is I32 of shape \[\] for NVFP4 bytes",
    ),
}


@pytest.mark.parametrize("name", [Q, E])
@pytest.mark.parametrize("fault", MALFORMED)
def test_a_fault_is_named_before_a_tensor_is_read(fault: str, name: str, tmp_path: Path):
    form, change, message = MALFORMED[fault]
    made = cell("qwen3_moe", form)
    change(made.checkpoint.tensors, name)
    folder = made.write(tmp_path)
    with planned_loads() as plans, pytest.raises(ValueError, match=message) as caught:
        mlx_lm.utils.load_config(folder)
    assert name.removesuffix("weight") in str(caught.value)
    check_agreement(folder, plans, str(caught.value))


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        ("NVFP4", {"quant_method": "gptq"}, "is NVFP4, and config.json says quant_method 'gptq'"),
        ("ModelOpt NVFP4", {"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ("MXFP4", {"format": "nvfp4-pack-quantized"}, "is MXFP4, and config.json says format"),
        ("NVFP4", {"format": "float-quantized"}, "is NVFP4, and config.json says format"),
        ("ModelOpt NVFP4", {"quant_algo": "FP8"}, "is NVFP4, and config.json says quant_algo"),
    ],
)
def test_a_config_of_another_form(form: str, config: dict[str, Any], message: str, tmp_path: Path):
    made = cell("qwen3_moe", form)
    made.checkpoint.config["quantization_config"] |= config
    folder = made.write(tmp_path)
    with planned_loads() as plans, pytest.raises(ValueError, match=message) as caught:
        load(folder)
    check_agreement(folder, plans, str(caught.value))


def test_settings_may_be_in_hf_quant_config(tmp_path: Path):
    made = cell("qwen3_moe", "ModelOpt NVFP4")
    del made.checkpoint.config["quantization_config"]
    made.files["hf_quant_config.json"] = {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16},
    }
    folder = made.write(tmp_path)
    with planned_loads() as plans:
        verdict = judge(folder, made.reference, 1e-5)
    assert verdict.word == "right", verdict
    check_agreement(folder, plans, None)


def test_quark_names_its_bytes_weight(tmp_path: Path):
    made = cell("qwen3_moe", "MXFP4")
    tensors = made.checkpoint.tensors
    for name in [name for name in tensors if name.endswith("_packed")]:
        tensors[name.removesuffix("_packed")] = tensors.pop(name)
    made.checkpoint.config["quantization_config"] = {"quant_method": "quark"}
    verdict = judge(made.write(tmp_path), made.reference, 1e-5)
    assert verdict.word == "right", verdict
    report = last_report()
    assert report is not None
    assert report.held_packed == 32


def test_bytes_with_float_scales_are_no_fp4(tmp_path: Path):
    """ModelOpt's W4A8 AWQ has integers in bytes, and scales to divide activations by."""
    made = cell("qwen3_moe", "ModelOpt NVFP4")
    tensors = made.checkpoint.tensors
    tensors[f"{Q}_scale"] = tensors[f"{Q}_scale"].float()
    with (
        planned_loads() as plans,
        pytest.raises(ValueError, match=r"q_proj\.weight is U8") as caught,
    ):
        load(made.write(tmp_path))
    check_agreement(tmp_path, plans, str(caught.value))


@pytest.mark.parametrize("form", ["NVFP4", "MXFP4"])
def test_what_stays_packed_is_not_quantised_again(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "8bit")
    folder = cell("qwen3_moe", form).write(tmp_path)
    with planned_loads() as plans, pytest.raises(ValueError, match="stay packed") as caught:
        load(folder)
    check_agreement(folder, plans, str(caught.value))


@pytest.mark.parametrize("form", ["NVFP4", "ModelOpt NVFP4", "MXFP4"])
def test_a_module_without_a_row_is_refused(form: str, tmp_path: Path):
    made = cell("llama", form)
    made.checkpoint.config["model_type"] = "helium"
    folder = made.write(tmp_path)
    with planned_loads() as plans, pytest.raises(ValueError, match="cannot be patched") as caught:
        load(folder)
    assert ("MXFP4" if form == "MXFP4" else "NVFP4") in str(caught.value)
    check_agreement(folder, plans, str(caught.value))
