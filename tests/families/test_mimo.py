"""MiMo says some settings twice: in keys of its release, and in those of transformers' class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parity.families import FAMILIES
from parity.reference import new_model
from support.agreement import check_agreement, planned_loads
from vllm_moe_compat import applied
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.settings_by_family import MIMO

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hybrid_layer_pattern", [1, 1]),
        ("moe_layer_freq", [1, 1]),
        ("sliding_window_size", 7),
        ("layernorm_epsilon", 0.5),
        ("rope_theta", 77.0),
        ("swa_rope_theta", 77.0),
        ("partial_rotary_factor", 0.25),
    ],
)
def test_a_contradiction_is_refused_by_key(key: str, value: Any, tmp_path: Path):
    from mlx_lm.utils import load_model

    new_model(FAMILIES["mimo_v2_flash"], False, 1.0).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert MIMO.apply(config, config)
    del config["rope_parameters"]  # Releases have none, and transformers' defaults.
    config |= {"rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334}
    config[key] = value
    file.write_text(json.dumps(config))
    words = f"config.json: {key} is "
    with (
        applied(),
        planned_loads() as plans,
        pytest.raises(UnsupportedCheckpointError, match=words) as caught,
    ):
        load_model(tmp_path)
    check_agreement(tmp_path, plans, str(caught.value))
