"""The settings that releases publish raise neither a refusal nor a warning.

``published.json`` has the sizes and settings of one release per family, as far as they concern
the language model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_moe_compat.families import modules
from vllm_moe_compat.plan.settle_settings import settle_settings

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_neither_refused_nor_warned_of(name: str):
    config = PUBLISHED[name]
    row = modules.row_of_config(config)
    assert row is not None
    settled = settle_settings(row.module, row, config)
    assert not [*settled.faults, *settled.warnings]
    assert settled.max_length is None


def test_another_value_of_a_published_setting_is_a_warning():
    config = json.loads(json.dumps(PUBLISHED["qwen3_5_moe"]))
    config["text_config"]["attn_output_gate"] = "half"
    row = modules.row_of_config(config)
    assert row is not None
    (warning,) = settle_settings(row.module, row, config).warnings
    assert "attn_output_gate = 'half'" in warning.message
