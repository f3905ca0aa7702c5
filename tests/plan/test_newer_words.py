"""What older classes of transformers say is brought to the words of the newest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_moe_compat.checkpoint.config import decode_floats
from vllm_moe_compat.plan.newer_words import in_newer_words, in_older_words

YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            {"layer_types": ["mamba", "attention", "moe"]},
            {"layer_types": ["linear_attention", "full_attention", "moe"]},
        ),
        (
            {"model_type": "olmo3", "rope_parameters": YARN},
            {
                "model_type": "olmo3",
                "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
            },
        ),
        (
            {
                "model_type": "minimax_m2",
                "head_dim": 128,
                "rotary_dim": 64,
                "rope_parameters": PLAIN,
            },
            {
                "model_type": "minimax_m2",
                "head_dim": 128,
                "rotary_dim": 64,
                "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5},
            },
        ),
        (
            {"model_type": "longcat_flash", "num_layers": 2, "num_hidden_layers": 4},
            {"model_type": "longcat_flash", "num_layers": 2},
        ),
        ({"model_type": "llama", "rope_parameters": YARN},) * 2,
    ],
)
def test_settings_get_the_newer_words_once(given: dict[str, Any], wanted: dict[str, Any]):
    assert in_newer_words(given) == wanted
    assert in_newer_words(wanted) == wanted


def test_a_config_gets_the_older_words_for_a_class_that_refuses_the_newer():
    inner = {"layers_block_type": ["linear_attention", "mlp", ["odd"]]}
    older = in_older_words({"layer_types": ["indexed_attention"], "text_config": inner})
    assert older == {
        "layer_types": ["deepseek_sparse_attention"],
        "text_config": {"layers_block_type": ["mamba", "mlp", ["odd"]]},
    }
    assert in_newer_words(older["text_config"]) == inner


def test_infinities_are_floats_and_other_dicts_stay():
    given = {"time_step_limit": [0.0, {"__float__": "Infinity"}], "a": {"__float__": "what"}}
    assert decode_floats(given) == {"time_step_limit": [0.0, math.inf], "a": {"__float__": "what"}}
    assert decode_floats({"a": {"b": {"__float__": "-Infinity"}}}) == {"a": {"b": -math.inf}}
