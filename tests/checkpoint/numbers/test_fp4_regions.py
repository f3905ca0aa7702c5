"""Parts of FP4 targets, and modules that read FP4 themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import vllm_moe_compat
from parity import fp4
from parity.mlx_families import FAMILIES as MLX_FAMILIES
from parity.test_without_transformers import checkpoint
from support.fp4 import cell
from support.loading import TOKENS, load, read, same_bits
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.layout import detect
from vllm_moe_compat.execute.build_tensor import make_build
from vllm_moe_compat.execute.stored_tensors import StoredTensors
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.plan.build import Restriction
from vllm_moe_compat.plan.planner import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.fixture(autouse=True)
def _hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3_moe", "NVFP4"),
        ("qwen3_moe", "ModelOpt NVFP4 combined"),
        ("qwen3_moe", "MXFP4"),
        ("llama4", "ModelOpt NVFP4 combined"),  # stored turned
    ],
)
@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize(
    "to",
    [
        Restriction(experts=(1, 3)),
        Restriction(rows=(8, 24)),
        Restriction(columns=(32, 64)),
        Restriction(experts=(2, 3), rows=(5, 9)),
    ],
)
def test_a_part_of_a_target_is_that_part(
    family: str, form: str, hold: bool, to: Restriction, tmp_path: Path
):
    folder = cell(family, form).write(tmp_path)
    tensors = read_headers(folder)
    config = json.loads((folder / "config.json").read_text())
    row = TRANSFORMS_BY_MODULE[f"mlx_lm.models.{family}"]
    plan = make_plan(detect(tensors, config, row.ignored), row, config, hold=hold)
    assert row.moe is not None
    builds = [build for build in plan.builds if f".{row.moe.target}." in build.target]
    assert builds
    for one in builds[:3]:
        formats = [one.held] * len(one.targets) if hold else []
        whole = make_build(one, read(folder), "float32", formats=formats)
        restricted = one.restricted(to)
        part = make_build(restricted, read(folder), "float32", formats=formats)
        files = StoredTensors(folder, tensors, gap=0)
        assert same_bits(make_build(restricted, dict(files), "float32", formats=formats), part)
        assert files.bytes_read == restricted.bytes_read(tensors)
        assert part.keys() == whole.keys()
        for name, array in whole.items():
            if to.experts is not None:
                array = array[slice(*to.experts)]
            if not name.endswith(".global_scale"):
                if to.rows is not None:
                    array = array[..., slice(*to.rows), :]
                if to.columns is not None:
                    width = {"scales": fp4.GROUPS["mxfp4" if form == "MXFP4" else "nvfp4"]}
                    per = width.get(name.rpartition(".")[2], 8) if hold else 1
                    array = array[..., to.columns[0] // per : to.columns[1] // per]
            assert mx.array_equal(part[name], array), name


def test_deepseeks_newest_module_keeps_its_own_forms():
    experts = {f"layers.0.ffn.experts.{e}.w1": (96, 64) for e in range(4)}
    tensors: dict[str, TensorInfo] = {}
    for name, (rows, columns) in experts.items():
        tensors[f"{name}.weight"] = TensorInfo("I8", (rows, columns // 2))
        tensors[f"{name}.scale"] = TensorInfo("F8_E8M0", (rows, columns // 32))
    tensors["layers.0.attn.wq_a.weight"] = TensorInfo("F8_E4M3", (64, 64))
    tensors["layers.0.attn.wq_a.scale"] = TensorInfo("F8_E8M0", (2, 2))
    layout = detect(tensors, {"quantization_config": {"quant_method": "fp8"}})
    assert {found.form.name for found in layout.numbers.found} == {"fp8", "mxfp4"}
    row = TRANSFORMS_BY_MODULE["mlx_lm.models.deepseek_v41"]
    plan = make_plan(layout, row, {}, hold=True)
    assert plan.empty
    assert plan.digested == 5


def test_kimi_k3s_experts_are_held(tmp_path: Path):
    (family,) = (found for found in MLX_FAMILIES if found.module == "kimi_k3")
    packed, floats = checkpoint(family, "published"), checkpoint(family, "published")
    generator = torch.Generator().manual_seed(5)
    experts = [n for n in packed.tensors if ".experts." in n and n.endswith(".weight")]
    assert experts
    for name in experts:
        rows, columns = packed.tensors.pop(name).shape
        bytes_ = torch.randint(0, 256, (rows, columns // 2), generator=generator)
        power = torch.randint(-8, -4, (rows, columns // 32), generator=generator)
        packed.tensors[f"{name}_packed"] = bytes_.to(torch.uint8)
        packed.tensors[f"{name}_scale"] = (power + 127).to(torch.uint8)
        exact = fp4.dequantize(bytes_, 2.0**power, torch.tensor(1.0))
        floats.tensors[name] = exact
    packed.config["quantization_config"] = fp4.config("ct mxfp4", [])
    held, plain = load(packed.write(tmp_path / "packed")), load(floats.write(tmp_path / "floats"))
    layer = held.layers[1].mlp.switch_mlp
    assert (layer.up_proj.mode, layer.up_proj.weight.dtype) == ("mxfp4", mx.uint32)
    found, wanted = (np.array(model(mx.array([TOKENS]))[0]) for model in (held, plain))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
