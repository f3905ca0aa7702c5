"""Forms that nobody here reads are refused by name, before a tensor is read.

Tensors hold noise: names, dtypes, shapes and the config decide.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import vllm_moe_compat
from support.agreement import check_agreement, planned_loads
from support.loading import load
from vllm_moe_compat.commands.convert.conversion import Options, convert
from vllm_moe_compat.plan.check_unreadable import UNREADABLE, is_read

pytestmark = pytest.mark.filterwarnings("ignore:::transformers")
Tensors = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn
SIZES = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture(autouse=True)
def _hooks() -> Iterator[None]:
    with vllm_moe_compat.applied():
        yield


def nf4(name: str, rows: int, columns: int) -> Tensors:
    return {
        name: torch.ones(rows * columns // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(rows * columns // 64, dtype=torch.uint8),
        f"{name}.nested_absmax": torch.ones(4),
        f"{name}.nested_quant_map": torch.ones(256),
        f"{name}.quant_map": torch.ones(16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.ones(90, dtype=torch.uint8),
    }


def int8_of_bitsandbytes(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        name: torch.ones(rows, columns, dtype=torch.int8),
        f"{stem}SCB": torch.ones(rows),
        f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def torchao(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}_weight_qdata": torch.ones(rows, columns // 8, dtype=torch.int32),
        f"{stem}_weight_scale_and_zero": torch.ones(columns // 32, rows, 2),
    }


def hqq(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}W_q": torch.ones(rows // 2, columns, dtype=torch.uint8),
        f"{stem}scale": torch.ones(rows, 1),
        f"{stem}zero": torch.ones(rows, 1),
    }


def eetq(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        name: torch.ones(columns, rows, dtype=torch.int8),
        f"{stem}weight_scales": torch.ones(rows, dtype=torch.float16),
    }


def aqlm(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}codes": torch.ones(rows, columns // 8, 1, dtype=torch.int16),
        f"{stem}codebooks": torch.ones(1, 256, 1, 8),
        f"{stem}scales": torch.ones(rows, 1, 1, 1),
    }


def vptq(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}centroids.weight": torch.ones(1, 4096),
        f"{stem}indices": torch.ones(1, rows, columns // 8, dtype=torch.int16),
    }


def quip(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}Qidxs": torch.ones(rows, columns // 8, dtype=torch.int16),
        f"{stem}SU": torch.ones(columns),
        f"{stem}SV": torch.ones(rows),
    }


def spqr(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}dense_weights": torch.ones(rows * columns // 16, dtype=torch.int64),
        f"{stem}row_offsets": torch.ones(rows + 1, dtype=torch.int32),
        f"{stem}col_vals": torch.ones(8, dtype=torch.int32),
    }


def bytes_alone(name: str, rows: int, columns: int) -> Tensors:
    return {name: torch.ones(rows, columns, dtype=torch.int8)}


def floats(name: str, rows: int, columns: int) -> Tensors:
    return {name: torch.ones(rows, columns)}


def fp8(name: str, rows: int, columns: int) -> Tensors:
    return {name: torch.ones(rows, columns).to(E4M3), f"{name}_scale": torch.ones(rows, 1)}


Make = Callable[[str, int, int], Tensors]
FORMS: dict[str, tuple[Make, dict[str, Any] | None, str]] = {
    "bitsandbytes NF4": (nf4, {"quant_method": "bitsandbytes"}, "belongs to a bitsandbytes"),
    "bitsandbytes NF4, no config": (nf4, None, "belongs to a bitsandbytes"),
    "bitsandbytes int8": (int8_of_bitsandbytes, {"load_in_8bit": True}, "to a bitsandbytes"),
    "torchao": (torchao, {"quant_method": "torchao"}, "belongs to a torchao"),
    "torchao, no config": (torchao, None, "belongs to a torchao"),
    "HQQ": (hqq, {"quant_method": "hqq"}, "belongs to a HQQ"),
    "SINQ": (hqq, {"quant_method": "sinq"}, "belongs to a SINQ"),
    "EETQ": (eetq, {"quant_method": "eetq"}, "belongs to a EETQ"),
    "AQLM": (aqlm, {"quant_method": "aqlm"}, "belongs to a AQLM"),
    "VPTQ": (vptq, {"quant_method": "vptq"}, "belongs to a VPTQ"),
    "QuIP#": (quip, None, "belongs to a QuIP#"),
    "SpQR": (spqr, {"quant_method": "spqr"}, "belongs to a SpQR"),
    "GGUF": (bytes_alone, {"quant_method": "gguf"}, r"quant_method 'gguf' \(GGUF\)"),
    "a method to come": (bytes_alone, {"quant_method": "xq9"}, "quant_method 'xq9', which neither"),
    "a method to come, floats": (floats, {"quant_method": "xq9"}, "quant_method 'xq9'"),
    "a form to come": (bytes_alone, None, "is I8, as which no form"),
    "FP8 said to be GPTQ": (fp8, {"quant_method": "gptq"}, "is FP8, and config.json says"),
}


def write(folder: Path, kind: str, make: Make, quantization: dict[str, Any] | None) -> Path:
    settings = SIZES | (MOE if kind == "Qwen3Moe" else {})
    model = getattr(transformers, f"{kind}ForCausalLM")
    model(getattr(transformers, f"{kind}Config")(**settings)).save_pretrained(folder)
    tensors: Tensors = {}
    for weight, tensor in load_file(folder / "model.safetensors").items():
        linear = weight.endswith("_proj.weight")
        tensors |= make(weight, *tensor.shape) if linear else {weight: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["Llama", "Qwen3Moe"])
def test_a_form_that_nobody_reads(kind: str, name: str, tmp_path: Path):
    make, quantization, message = FORMS[name]
    folder = write(tmp_path / "there", kind, make, quantization)
    with planned_loads() as plans, pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "download the checkpoint again" not in str(caught.value) or "FP8 said" in name
    assert "instead" in str(caught.value) or "correct quantization_config" in str(caught.value)
    check_agreement(folder, plans, str(caught.value))
    if kind == "Llama":
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "converted", Options())
        assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", ["bitsandbytes NF4", "a method to come"])
def test_a_module_without_a_row(name: str, tmp_path: Path):
    make, quantization, message = FORMS[name]
    folder = write(tmp_path / "there", "Llama", make, quantization)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "helium"}
    (folder / "config.json").write_text(json.dumps(config))
    with planned_loads() as plans, pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert plans[0].row is None
    assert plans[0].module == "mlx_lm.models.helium"
    check_agreement(folder, plans, str(caught.value))


@pytest.mark.parametrize("method", ["fbgemm_fp8", "quark", "modelopt"])
def test_fp8_under_another_method_is_fp8(method: str, tmp_path: Path):
    folder = write(tmp_path, "Llama", fp8, {"quant_method": method})
    model = load(folder)
    assert (model.model.layers[0].self_attn.q_proj.weight == 1).all()


def test_every_method_of_transformers_is_read_or_named():
    named = {method for form in UNREADABLE for method in form.methods}
    # Quantise while loading, or repack for a kernel: such checkpoints are not published.
    unpublished = {"fouroversix", "nvfp4", "metal", "auto-round"}
    for method in AUTO_QUANTIZER_MAPPING:
        assert is_read(method) or method in named | unpublished, method


def test_no_attribute_of_an_mlx_lm_module_has_such_a_name():
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    attributes: set[str] = set()
    for source in Path(folder, "models").glob("*.py"):
        attributes |= set(re.findall(r"\bself\.(\w+)\s*(?::[^=\n]+)?=[^=]", source.read_text()))
    assert "q_proj" in attributes
    endings = tuple(ending for form in UNREADABLE for ending in form.endings)
    assert [n for n in attributes if f".{n}".endswith(endings)] == []
    assert [n for n in attributes if f".{n}.weight".endswith(endings)] == []
