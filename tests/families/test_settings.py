"""config.json in mlx-lm's words: once, whatever is in it, and no more than has to be."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import mlx_lm.utils
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity.families import FAMILIES
from parity.family import Family
from parity.reference import new_config
from parity.release import release_config
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.families.registry import (
    TRANSFORMS_BY_MODULE,
    row_of_model_type,
    translate_config,
)
from vllm_moe_compat.families.row import Row

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

ROWS = list(TRANSFORMS_BY_MODULE.values())
Config = dict[str, Any]


@cache
def _configs(name: str) -> tuple[Config, ...]:
    with tempfile.TemporaryDirectory() as folder:
        new_config(FAMILIES[name]).save_pretrained(folder)
        saved = json.loads(Path(folder, "config.json").read_text())
    return saved, release_config(FAMILIES[name].base, saved)


def configs(family: Family) -> list[Config]:
    """What transformers 5 writes for the family, and what its authors do."""
    return deepcopy(list(_configs(family.name)))


def fixed(row: Row, config: Config) -> list[str]:
    """Apply the row's fixes; a refusal is one too."""
    try:
        return translate_config(row, config)
    except CompatError as error:
        return [str(error)]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_second_time_changes_nothing(family: Family):
    for config in configs(family):
        row = row_of_model_type(config, mlx_lm.utils.MODEL_REMAPPING)
        if row is None:
            assert family.module == "dbrx"
            continue
        refused = "since mlx-lm's module makes" in "".join(fixed(row, config))
        once = deepcopy(config)
        assert refused or fixed(row, config) == []
        assert config == once


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_what_was_changed_is_said_and_nothing_else_is(family: Family):
    for config in configs(family):
        row = row_of_model_type(config, mlx_lm.utils.MODEL_REMAPPING)
        if row is not None:
            before = deepcopy(config)
            assert bool(fixed(row, config)) == (config != before) or "mixed" in family.name


ODD: list[Any] = [None, "x", "", 0, -1, 1, 2.5, True, False, [], {}, [None], ["x"], {"x": "y"}]
ODD += [{"full_attention": {}}, {"full_attention": 3, "sliding_attention": None}, [[]], [{}], 2**70]
ODD += [{"rope_type": ["x"], "rope_theta": "x"}, {"0": 1, "1": {"head_dim": []}}, float("nan")]
KEYS = (
    "text_config",
    "rope_parameters",
    "rope_scaling",
    "layer_types",
    "mlp_layer_types",
    "per_layer_config",
    "quantization_config",
    "expert_layer_offset",
    "expert_layer_period",
    "mlp_only_layers",
    "decoder_sparse_step",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "partial_rotary_factor",
    "linear_attn_config",
    "attention_other_setting",
    "num_key_value_heads",
    "sliding_window",
    "model_type",
)


@st.composite
def odd_configs(draw: st.DrawFn) -> tuple[Row, Config]:
    """A row and a config of one of its families, with values that mean nothing in it."""
    row = draw(st.sampled_from(ROWS))
    own = [f for f in FAMILIES.values() if _is_of(row, f)]
    config: Config = {}
    if own:
        config = draw(st.sampled_from(configs(draw(st.sampled_from(own)))))
    for _ in range(draw(st.integers(1, 5))):
        place = config
        for section in ("text_config", "rope_parameters"):
            inner = place.get(section)
            if isinstance(inner, dict) and draw(st.booleans()):
                place = inner
        key = draw(st.sampled_from([*KEYS, *(k for k in place if isinstance(k, str))]))
        if draw(st.integers(0, 4)):
            place[key] = deepcopy(draw(st.sampled_from(ODD)))
        else:
            place.pop(key, None)
    return row, config


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(odd_configs())
def test_odd_values_are_refused_by_name_or_left_to_mlx_lm(found: tuple[Row, Config]):
    row, config = found
    fixed(row, config)
    once = repr(config)
    fixed(row, config)
    assert repr(config) == once, "it swings"


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.translations], ids=lambda row: row.module
)
def test_one_odd_value_at_a_time(row: Row):
    """In real configs, and in ones that hold nothing else."""
    bases: list[Config] = [{}, {"text_config": {}}]
    bases += [c for f in FAMILIES.values() if f.forms == () for c in configs(f) if _is_of(row, f)]
    for base in bases:
        for path in _places(base):
            for key in {*KEYS, *_at(base, path)}:
                for value in ODD:
                    config = deepcopy(base)
                    _at(config, path)[key] = deepcopy(value)
                    try:
                        fixed(row, config)
                    except Exception as error:
                        raise AssertionError(f"{path}, {key}: {value!r}") from error


def _is_of(row: Row, family: Family) -> bool:
    return row.module.rpartition(".")[2] == family.module


def _places(config: Config) -> list[tuple[str, ...]]:
    """The paths of the config's sections that fixes look into."""
    paths: list[tuple[str, ...]] = [()]
    for path in paths:
        for key in ("text_config", "rope_parameters", "full_attention", "per_layer_config", "1"):
            if isinstance(_at(config, path).get(key), dict):
                paths.append((*path, key))
    return paths


def _at(config: Config, path: tuple[str, ...]) -> Config:
    for key in path:
        config = config[key]
    return config


# Rotary embeddings that a module makes plain, whatever the config says.
