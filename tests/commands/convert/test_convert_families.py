"""Families of every kind: stock mlx-lm computes of the converted what we do of the release."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from parity.verdict import stock
from support.interrupting import contents, interrupted
from support.loading import TOKENS
from vllm_moe_compat.commands.convert.conversion import Options, convert

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

CASES = (
    ("mixtral", "block FP8"),  # w1, w2, w3
    ("gpt_oss", "release"),  # combined, interleaved, transposed, with biases
    ("deepseek_v3", "block FP8"),  # kv_b_proj, with which sanitize computes
    ("qwen3", "per-channel FP8"),  # dense
    ("falcon_h1", "block FP8"),  # whose sanitize multiplies arrays in place
    ("hunyuan_v1_moe", "release"),  # corrected on the instance, which no tensor carries
    ("qwen2_moe linear", "release"),  # a scaled rotary embedding that the module ignores
)
OTHERWISE = ("hunyuan_v1_moe", "qwen2_moe linear")


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_logits_are_the_same_or_the_difference_is_announced(
    name: str, form: str, tmp_path: Path, monkeypatch
):
    source = build(FAMILIES[name], FORM_BY_NAME[form]).write(tmp_path / "source")
    report = convert(source, tmp_path / "out", Options(dtype="float32"))
    tokens = mx.array([TOKENS])
    with stock():
        model, _ = mlx_lm.utils.load_model(tmp_path / "out")
        found = np.array(model(tokens)[0])
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        model, _ = mlx_lm.utils.load_model(source)
    model.set_dtype(mx.float32)
    same = np.array_equal(found, np.array(model(tokens)[0]))
    assert same == (not report.notes)
    assert same == (name not in OTHERWISE)


@pytest.mark.full
@pytest.mark.parametrize("setting", ["none", "8bit"])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_an_interrupted_conversion_ends_in_the_same_bytes(
    name: str, form: str, setting: str, tmp_path: Path
):
    source = build(FAMILIES[name], FORM_BY_NAME[form]).write(tmp_path / "source")
    options = Options(setting=setting, shard_bytes=30_000)
    shards = convert(source, tmp_path / "whole", options).shards
    for after in (1, shards // 2):
        with interrupted(after), pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", options)
    report = convert(source, tmp_path / "out", options)
    assert f"an interrupted run had finished {1 + shards // 2} shards" in report.notes
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
