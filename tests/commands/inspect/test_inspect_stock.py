"""What inspect says of mlx-lm by itself is what mlx-lm was seen to do.

``docs/data/parity.json`` holds what the tests in ``tests/parity`` recorded: every family in
every form, loaded by stock mlx-lm and compared with transformers.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from parity.families import FAMILIES
from parity.forms import FORMS, applies, build
from vllm_moe_compat.commands.inspect.collect import inspect

RECORDED = json.loads(
    (Path(__file__).parents[3] / "docs" / "data" / "parity.json").read_text(encoding="utf-8")
)["families"]
ALLOWED = {
    "loads": {"right"},
    "refuses": {"refused"},
    "wrong": {"wrong", "fails"},
    "refuses or wrong": {"refused", "wrong", "fails"},
    "unsure": {"right", "refused", "wrong", "fails"},
}
ALL = tuple(form.name for form in FORMS)
SOME = ("release", "block FP8")
CHOSEN = {
    **dict.fromkeys(("mixtral", "qwen3_5_moe", "deepseek_v3", "ministral3"), ALL),
    **dict.fromkeys(("kimi_vl", "gpt_oss", "jamba", "ernie4_5_moe", "hunyuan_v1_moe"), SOME),
    **dict.fromkeys(("mistral4", "qwen3_moe yarn", "qwen3_vl_moe tied", "olmo3"), SOME),
}
"""One family per reason that there is, and the forms that are tried."""


@pytest.mark.parametrize("name", CHOSEN)
def test_the_verdict_is_what_was_recorded(name: str, tmp_path: Path):
    said: Counter[str] = Counter()
    for form in FORMS:
        if form.name not in CHOSEN[name] or not applies(FAMILIES[name], form):
            continue
        ours, stock = RECORDED[name]["cells"][form.name]
        found = inspect(str(build(FAMILIES[name], form).write(tmp_path / form.name)))
        assert found.stock is not None, found.findings
        assert stock.partition(":")[0] in ALLOWED[found.stock.verdict], (form.name, found.stock)
        assert (found.verdict, found.exit_code, ours) == ("loads", 0, "right")
        said[found.stock.verdict] += 1
    assert said.total() > said["unsure"]
