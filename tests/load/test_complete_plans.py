"""A complete plan gives the same tensors, and has a build for every expert tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from support.cells import daily
from support.loading import load, parameters, same_bits
from vllm_moe_compat.execute.quantize import SanitizedLoad
from vllm_moe_compat.load.options import loading_with

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

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
    ("deepseek_v3", "block FP8"),
    ("qwen3_moe", "NVFP4"),
]


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


@pytest.mark.parametrize(("family", "form"), daily(EACH_DAY))
def test_the_tensors_are_the_same_and_no_expert_is_made_early(
    family: str, form: str, tmp_path: Path
):
    folder = build(FAMILIES[family], FORM_BY_NAME[form]).write(tmp_path)
    wanted = parameters(load(folder))
    named: set[str] = set()

    def arrange(sanitized: SanitizedLoad, model: Any) -> None:
        named.update(name for packed in sanitized.builds for name in packed.names)

    with loading_with(arrange=arrange):
        found = parameters(load(folder))
    assert same_bits(found, wanted)
    experts = [n for n in wanted if n.endswith((".weight", ".bias")) and _is_routed(n)]
    assert named >= set(experts)
    assert named


def _is_routed(name: str) -> bool:
    return any(f".{part}." in name for part in ("switch_mlp", "switch_glu", "experts"))
