"""What ``inspect`` says of experts on disk is what a load with that setting does."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_config

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import CELLS, FORM_BY_NAME, build
from parity.refused import REFUSED
from support.loading import load
from vllm_moe_compat.backend.model import loader
from vllm_moe_compat.commands.inspect import as_json, markdown, text
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.commands.inspect.model import ExpertCache, Inspection
from vllm_moe_compat.envs import EXPERT_CACHE, QUANTIZE
from vllm_moe_compat.errors import CompatError, UnsupportedCheckpointError
from vllm_moe_compat.expert_cache.install import containers
from vllm_moe_compat.families import registry
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.plan.expert_cache import divide, parse
from vllm_moe_compat.plan.expert_layers import planned_experts
from vllm_moe_compat.plan.make import make
from vllm_moe_compat.plan.planned_load import read_headers_of
from vllm_moe_compat.plan.serving import serving

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
FORMS = [f.name for m, f in CELLS if m.name == "qwen3_moe" and (m.name, f.name) not in REFUSED]
EACH_DAY = ("release", "MLX form", "block FP8", "GPTQ", "NVFP4", "MXFP4")


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def write(path: Path, form: str = "release", family: str = "qwen3_moe") -> Path:
    return build(FAMILIES[family], FORM_BY_NAME[form]).write(path)


def caches(found: Inspection) -> ExpertCache:
    assert found.memory is not None
    assert found.memory.expert_cache is not None
    return found.memory.expert_cache


@pytest.mark.parametrize(
    "form", [f if f in EACH_DAY else pytest.param(f, marks=pytest.mark.full) for f in FORMS]
)
def test_slots_and_bytes_are_those_of_the_load(form: str, tmp_path: Path, monkeypatch):
    path = write(tmp_path, form)
    monkeypatch.setenv(EXPERT_CACHE.name, "60%")
    found = inspect(str(path))
    assert found.exit_code == 0
    (option,) = [o for o in caches(found).options if o.setting == "60%"]
    held = containers(load(path))
    report = last_report()
    assert report is not None
    assert report.expert_cache is not None
    assert option.held == report.expert_cache.nbytes == sum(one.nbytes for one in held)
    assert option.slots == min(one.slots for one in held)
    assert caches(found).full == report.expert_cache.full
    assert caches(found).least == report.expert_cache.least
    assert found.memory is not None
    assert found.memory.needs[0].weights == option.weights


def test_a_dense_model_has_no_section(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(EXPERT_CACHE.name, "1%")
    found = inspect(str(write(tmp_path, family="qwen3")))
    assert found.exit_code == 0
    assert found.memory is not None
    assert found.memory.expert_cache is None


@pytest.mark.parametrize("value", ["1b", "0%", "10%"])
def test_a_cache_that_is_too_small_is_refused_alike(value: str, tmp_path: Path, monkeypatch):
    path = write(tmp_path)
    smallest = caches(inspect(str(path))).least_setting
    monkeypatch.setenv(EXPERT_CACHE.name, value)
    found = inspect(str(path))
    assert (found.verdict, found.exit_code) == ("refuses", 1)
    (finding,) = found.findings
    assert finding.id == "expert-cache"
    with pytest.raises(CompatError) as error:
        load(path)
    assert str(error.value) == f"{finding.message}; {finding.remedy}."
    assert f"at least {smallest}," in finding.remedy
    monkeypatch.setenv(EXPERT_CACHE.name, smallest)
    assert inspect(str(path)).exit_code == 0
    assert {one.slots for one in containers(load(path))} == {2}


def test_without_a_number_of_experts_per_token_it_says_why(tmp_path: Path, monkeypatch):
    path = write(tmp_path)
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["num_experts_per_tok"] = "two"
    file.write_text(json.dumps(config))
    monkeypatch.setenv(EXPERT_CACHE.name, "50%")
    found = inspect(str(path))
    assert found.exit_code == 1
    with pytest.raises(CompatError):
        load(path)


def test_all_formats_show_the_caches(tmp_path: Path, monkeypatch):
    path = write(tmp_path)
    found = inspect(str(path))
    cache = caches(found)
    assert (cache.layers, cache.experts, cache.per_token) == (2, 4, 2)
    assert [option.setting for option in cache.options] == ["off", "50%"]
    for report in (text.render(found), markdown.render(found)):
        plain = report.replace("\\", "")
        assert "Experts on disk" in plain
        assert "2 of 4 experts in each of 2 layers" in plain
        assert f"{EXPERT_CACHE.name}={cache.least_setting}" in plain
    shown = json.loads(as_json.render(found))["memory"]["expert_cache"]
    assert shown["options"][0]["held"] == shown["full"]
    monkeypatch.setenv(QUANTIZE.name, "8bit")
    packed = caches(inspect(str(path)))
    assert packed.quantize == "8bit"
    assert packed.full < cache.full


def test_lack_of_memory_names_a_cache_that_fits(tmp_path: Path, monkeypatch):
    path = write(tmp_path)
    cache = caches(inspect(str(path)))
    limit = (cache.options[0].loading + cache.options[1].loading) // 2
    memory = "vllm_moe_compat.commands.inspect.needs.host_memory"
    monkeypatch.setattr(memory, lambda: (limit, limit))
    found = inspect(str(path))
    (finding,) = [f for f in found.findings if f.id == "memory"]
    assert f"{EXPERT_CACHE.name}=50%" in finding.remedy
    monkeypatch.setenv(EXPERT_CACHE.name, "50%")
    assert not inspect(str(path)).findings


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
@pytest.mark.parametrize("setting", ["none", pytest.param("4bit", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "form", [f if f == "GPTQ" else pytest.param(f, marks=pytest.mark.full) for f in FORMS]
)
def test_what_serves_has_the_planned_bytes(form, setting, dtype, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_MOE_COMPAT_DTYPE")
    monkeypatch.setenv(QUANTIZE.name, setting)
    path = write(tmp_path, form)
    setting_of_cache = parse("60%")
    assert setting_of_cache is not None
    monkeypatch.setenv(EXPERT_CACHE.name, setting_of_cache.words)
    planned = make(read_headers_of(path), load_config(path), serving("cpu", dtype))
    if planned.faults:
        with pytest.raises(CompatError):
            loader.load(str(path), None, getattr(mx, dtype))
        return
    found = planned_experts(planned, setting, "cpu")
    cache = divide(found.layers, found.per_token, setting_of_cache)
    served = loader.load(str(path), None, getattr(mx, dtype)).expert_cache
    assert served is not None
    assert (served.slots, served.nbytes) == (cache.slots, cache.nbytes)
    assert (served.full, served.least) == (cache.full, cache.least)


@pytest.mark.parametrize("missing", ["row", "hook"])
def test_experts_that_the_plan_does_not_reach_are_refused(missing: str, tmp_path, monkeypatch):
    import mlx_lm.models.qwen3_moe as module

    path = write(tmp_path)
    monkeypatch.setenv(EXPERT_CACHE.name, "50%")
    vllm_moe_compat.revert()
    if missing == "row":
        rows = registry.TRANSFORMS_BY_MODULE
        monkeypatch.setattr(
            registry,
            "TRANSFORMS_BY_MODULE",
            {name: row for name, row in rows.items() if name != module.__name__},
        )
        found = inspect(str(path))
        assert (found.verdict, found.exit_code) == ("refuses", 1)
        assert [f.id for f in found.findings if f.severity == "error"] == ["expert-cache"]
    else:
        monkeypatch.setattr(module.Model, "sanitize", "none")
    with (
        vllm_moe_compat.applied(),
        pytest.raises(UnsupportedCheckpointError, match="EXPERT_CACHE is 50%, and the registry"),
    ):
        load(path)
