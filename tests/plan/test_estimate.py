"""What is estimated from headers is what the load then holds."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME
from parity.forms import build as parity
from support.checkpoints import Fp8, Sizes, build
from support.loading import load, parameters
from vllm_moe_compat.load import hooks
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.plan.estimate import Estimate

SIZES = Sizes(hidden=128, intermediate=64)


@pytest.mark.parametrize("form", ["per-expert", "combined"])
@pytest.mark.parametrize("fp8", [None, Fp8()], ids=["bf16", "fp8"])
@pytest.mark.parametrize("setting", ["none", "8bit", "mxfp8", "6bit", "4bit"])
def test_final_bytes(form: str, fp8: Fp8 | None, setting: str, tmp_path: Path, monkeypatch):
    found: list[Estimate] = []
    estimate = hooks.estimate
    monkeypatch.setattr(hooks, "estimate", lambda *args: found.append(estimate(*args)) or found[-1])
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", setting)
    path = build(form, fp8, sizes=SIZES, mtp=True, vision=True).write(tmp_path)
    with vllm_moe_compat.applied():
        held = sum(array.nbytes for array in parameters(load(path)).values())
    if not found:  # An empty plan: nothing to estimate.
        assert (form, fp8, setting) == ("combined", None, "none")
        return
    # Routers have a format of their own, which the headers do not tell.
    assert held == pytest.approx(found[0].final[setting], rel=0.01)
    assert found[0].peak[setting] > held
    mx.clear_cache()


def test_final_bytes_of_fp8_that_sanitize_dequantises(tmp_path: Path, monkeypatch):
    found: list[Estimate] = []
    estimate = hooks.estimate
    monkeypatch.setattr(hooks, "estimate", lambda *args: found.append(estimate(*args)) or found[-1])
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
    cell = parity(FAMILIES["deepseek_v3"], FORM_BY_NAME["block FP8 128"])
    path = cell.write(tmp_path)
    with vllm_moe_compat.applied():
        held = sum(array.nbytes for array in parameters(load(path)).values())
        report = last_report()
    assert report is not None
    assert report.digested
    assert held == pytest.approx(found[0].final["none"], rel=0.01)
    mx.clear_cache()


def test_the_largest_setting_that_fits_comes_first():
    needs = Estimate(0, {}, {"none": 16, "8bit": 9, "mxfp8": 8, "4bit": 5})
    assert needs.fitting(9) == ["8bit", "mxfp8", "4bit"]
    assert needs.fitting(1) == []
