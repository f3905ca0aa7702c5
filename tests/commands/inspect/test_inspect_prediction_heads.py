"""What ``inspect`` says of prediction heads is what a load of them does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, Cell, build
from support.checkpoint_heads import add_head, layer_count
from vllm_moe_compat.commands.inspect import as_json, text
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.commands.inspect.model import PredictionHeads
from vllm_moe_compat.envs import QUANTIZE
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.load.prediction_heads import load_heads

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def cell_of(family: str, form: str) -> Cell:
    cell = build(FAMILIES[family], FORM_BY_NAME[form])
    add_head(cell.checkpoint, FAMILIES[family].module, layer_count(cell.checkpoint.tensors) - 1)
    return cell


def heads(folder: Path) -> PredictionHeads:
    found = inspect(str(folder)).prediction_heads
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3_5_moe", "block FP8 128"),
        ("qwen3_next", "release"),
        ("deepseek_v3", "int4"),
        ("glm4_moe", "NVFP4"),
    ],
)
def test_bytes_are_those_of_the_load(family: str, form: str, tmp_path: Path):
    cell = cell_of(family, form)
    without = {*build(FAMILIES[family], FORM_BY_NAME[form]).checkpoint.tensors}
    folder = cell.write(tmp_path)
    found = heads(folder)
    loaded = load_heads(folder, "float32", lambda model: None)
    assert found.weights == loaded.weight_bytes
    assert found.refused == []
    given = [t for name, t in cell.checkpoint.tensors.items() if name not in without]
    assert found.tensors == len(given)
    assert found.bytes == sum(t.numel() * t.element_size() for t in given)


def test_a_quantised_load_quantises_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = cell_of("qwen3_5_moe", "block FP8 128").write(tmp_path)
    plain = heads(folder).weights
    monkeypatch.setenv(QUANTIZE.name, "8bit")
    found = heads(folder).weights
    loaded = load_heads(folder, "float32", lambda model: None)
    assert found is not None
    assert plain is not None
    assert found < plain / 2
    assert abs(found - loaded.weight_bytes) < 0.05 * found  # The router has a format of its own.


def test_the_report_says_it(tmp_path: Path):
    folder = cell_of("glm4_moe", "release").write(tmp_path)
    found = inspect(str(folder))
    shown = text.render(found)
    assert "Prediction heads" in shown
    assert "with method mtp  the first head is loaded" in shown
    assert json.loads(as_json.render(found))["prediction_heads"]["refused"] == []


def test_what_the_load_refuses_is_said_before(tmp_path: Path):
    cell = cell_of("glm4_moe", "release")
    del cell.checkpoint.tensors["model.layers.2.hnorm.weight"]
    del cell.checkpoint.tensors["model.layers.2.self_attn.k_proj.weight"]
    folder = cell.write(tmp_path)
    found = inspect(str(folder))
    assert found.verdict == "loads"  # The head is not asked for.
    assert found.exit_code == 0
    assert found.prediction_heads is not None
    assert found.prediction_heads.weights is None
    first, second = found.prediction_heads.refused
    assert "model.layers.2.hnorm.weight" in first
    assert "model.layers.2.self_attn.k_proj.weight" in second
    with pytest.raises(CompatError) as caught:
        load_heads(folder, "float32", lambda model: None)
    assert first in str(caught.value)
    assert f"cannot be used  {first}" in text.render(found)


def test_unknown_heads_are_named(tmp_path: Path):
    cell = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"])
    cell.checkpoint.tensors["mtp.fc.weight"] = torch.zeros(4, 4)
    found = heads(cell.write(tmp_path))
    assert found.weights is None
    assert "mtp.fc.weight" in found.refused[0]
    assert (found.tensors, found.bytes) == (1, 64)


def test_a_checkpoint_without_heads_has_no_section(tmp_path: Path):
    folder = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"]).write(tmp_path)
    assert inspect(str(folder)).prediction_heads is None
