"""A load that leaves experts on disk computes the bits of one that holds them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from parity.mlx_families import MlxFamily
from parity.test_without_transformers import CELLS as OTHERS
from parity.test_without_transformers import checkpoint as without_transformers
from support.cells import daily
from support.loading import TOKENS, load, new_model, parameters, read
from vllm_moe_compat.errors import CompatError, InsufficientMemoryError, LayoutError
from vllm_moe_compat.expert_cache.install import CONTAINERS, containers
from vllm_moe_compat.load.report import last_report

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

CACHE = "VLLM_MOE_COMPAT_EXPERT_CACHE"
EACH_DAY = [
    ("mixtral", "release"),
    ("qwen3_moe", "MLX form"),
    ("qwen3_5_moe", "saved"),
    ("qwen3_next", "block FP8"),
    ("gpt_oss", "saved"),
    ("llama4", "release"),
    ("nemotron_h", "release"),
    ("gemma4", "saved"),
    ("granitemoe", "release"),
    ("deepseek_v3", "GPTQ"),
    ("qwen3_moe", "NVFP4"),
    ("dots1", "MXFP4"),
]


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def logits(model: Any) -> mx.array:
    found: mx.array = model(mx.array([TOKENS]))
    mx.eval(found)
    return found


def smallest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the size that the refusal of one that is too small names."""
    monkeypatch.setenv(CACHE, "1b")
    with pytest.raises(InsufficientMemoryError, match="set it to at least") as refusal:
        load(folder)
    return str(refusal.value).partition("set it to at least ")[2].partition(",")[0]


@pytest.mark.parametrize(("family", "form"), daily(EACH_DAY, without=["dbrx"]))
def test_the_logits_have_the_bits_of_the_resident_model(
    family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = build(FAMILIES[family], FORM_BY_NAME[form]).write(tmp_path)
    whole = load(folder)
    wanted = logits(whole)
    caches = ["60%"]
    has_experts = any(isinstance(module, CONTAINERS) for module in whole.modules())
    if has_experts:
        caches.append(smallest(folder, monkeypatch))
    for cache in caches:
        monkeypatch.setenv(CACHE, cache)
        model = load(folder)
        assert mx.array_equal(logits(model), wanted).item(), cache
        assert mx.array_equal(logits(model), wanted).item(), f"{cache}, again"
        cached, report = containers(model), last_report()
        assert bool(cached) == has_experts
        if not has_experts:
            continue
        assert all(one.slots < one.experts for one in cached)
        assert report is not None
        assert report.expert_cache is not None
        assert report.expert_cache.nbytes == sum(one.nbytes for one in cached)
        routed = [n for n in parameters(model) if any(n.startswith(f"{c.layer}.") for c in cached)]
        assert not routed


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "form"),
    [(f, form) for f, form in OTHERS if f.runs],
    ids=[f"{f.module}-{form}" for f, form in OTHERS if f.runs],
)
def test_the_logits_of_families_without_transformers(
    family: MlxFamily, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = without_transformers(family, form).write(tmp_path, shards=1)
    wanted = logits(load(folder))
    for cache in ("75%", smallest(folder, monkeypatch)):
        monkeypatch.setenv(CACHE, cache)
        model = load(folder)
        assert containers(model)
        assert mx.array_equal(logits(model), wanted).item(), cache


def test_a_cache_for_all_experts_is_a_whole_load(tmp_path: Path, monkeypatch):
    folder = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"]).write(tmp_path)
    monkeypatch.setenv(CACHE, "100%")
    model = load(folder)
    assert not containers(model)
    assert any("switch_mlp" in name for name in parameters(model))


def test_the_setting_also_packs(tmp_path: Path, monkeypatch):
    folder = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["block FP8"]).write(tmp_path)
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "8bit")
    wanted = logits(load(folder))
    monkeypatch.setenv(CACHE, "60%")
    model = load(folder)
    assert mx.array_equal(logits(model), wanted).item()
    packed = last_report()
    assert packed is not None
    assert packed.expert_cache is not None
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "none")
    load(folder)
    whole = last_report()
    assert whole is not None
    assert whole.expert_cache is not None
    assert packed.expert_cache.full < whole.expert_cache.full


def test_a_dense_model_has_nothing_to_leave_on_disk(tmp_path: Path, monkeypatch):
    folder = build(FAMILIES["qwen3"], FORM_BY_NAME["release"]).write(tmp_path)
    wanted = logits(load(folder))
    monkeypatch.setenv(CACHE, "50%")
    assert mx.array_equal(logits(load(folder)), wanted).item()


def test_tensors_that_other_code_changed_are_refused(tmp_path: Path, monkeypatch):
    folder = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"]).write(tmp_path)
    monkeypatch.setenv(CACHE, "60%")
    model = new_model(mlx_lm.utils.load_config(folder))
    weights = read(folder)
    weights["model.norm.twice.weight"] = weights["model.norm.weight"]
    with pytest.raises(LayoutError, match="other code changed the tensors"):
        model.sanitize(weights)


def test_the_load_ends_before_a_tensor_is_read_if_the_cache_is_too_small(
    tmp_path: Path, monkeypatch
):
    folder = build(FAMILIES["mixtral"], FORM_BY_NAME["release"]).write(tmp_path)
    monkeypatch.setenv(CACHE, "1%")
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with pytest.raises(CompatError, match=CACHE):
        load(folder)
    assert mx.get_peak_memory() - before < 2**16
