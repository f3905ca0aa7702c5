"""config.json in mlx-lm's words: once, whatever is in it, and no more than has to be."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from functools import cache
from itertools import cycle
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
from support.as_read import as_read
from vllm_moe_compat.errors import CompatError, UnsupportedCheckpointError
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE, row_of_model_type
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.plan.effective_config import effective_config

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


def effective(config: Config) -> tuple[Config, tuple[str, ...]]:
    """Return the effective config and what was translated; a refusal is the latter."""
    try:
        made = effective_config(config)
    except CompatError as error:
        return config, (str(error),)
    return made.config, made.translated


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_second_time_changes_nothing(family: Family):
    for config in configs(family):
        if row_of_model_type(config, mlx_lm.utils.MODEL_REMAPPING) is None:
            assert family.module == "dbrx"
            continue
        once, said = effective(config)
        assert effective(once)[0] == once
        assert not any(word.startswith("config.json") for word in said) or "mixed" in family.name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_what_was_changed_is_said_and_nothing_else_is(family: Family):
    for config in configs(family):
        if row_of_model_type(config, mlx_lm.utils.MODEL_REMAPPING) is not None:
            before = deepcopy(config)
            made, said = effective(config)
            assert config == before
            changes = as_read(made) != as_read(before)
            assert bool({*said} - {"model_type"}) == changes or "mixed" in family.name


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
def odd_configs(draw: st.DrawFn) -> Config:
    """A config of one of the families, with values that mean nothing in it."""
    row = draw(st.sampled_from(ROWS))
    own = [f for f in FAMILIES.values() if _is_of(row, f)]
    config: Config = {"model_type": row.module.rpartition(".")[2]}
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
    return config


@pytest.mark.full
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(odd_configs())
def test_odd_values_are_refused_by_name_or_left_to_mlx_lm(config: Config):
    once, _ = effective(config)
    again, _ = effective(once)
    assert json.dumps(again, sort_keys=True) == json.dumps(once, sort_keys=True), "it swings"


@pytest.mark.parametrize(
    "row",
    # Each is a call of transformers' class per key: a sixth of the rows every day.
    [pytest.param(r, marks=() if n % 6 == 0 else pytest.mark.full) for n, r in enumerate(ROWS)],
    ids=lambda row: row.module,
)
def test_one_odd_value_at_a_time(row: Row):
    """In real configs, and in ones that hold nothing else."""
    kind = row.module.rpartition(".")[2]
    bases: list[Config] = [{"model_type": kind}, {"model_type": kind, "text_config": {}}]
    bases += [configs(f)[0] for f in FAMILIES.values() if f.forms == () and _is_of(row, f)][:1]
    values = cycle(ODD)
    for base in bases:
        for path in _places(base):
            for key in sorted({*KEYS, *_at(base, path)}):
                config, value = deepcopy(base), next(values)
                _at(config, path)[key] = deepcopy(value)
                try:
                    effective(config)
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


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "kimi_linear"])
def test_dense_layers_behind_sparse_ones_are_refused_by_name(name: str):
    config = new_config(FAMILIES[name]).to_dict()
    kinds = ["dense"] * config["num_hidden_layers"]
    kinds[0] = "sparse"
    config["mlp_layer_types"] = kinds
    with pytest.raises(UnsupportedCheckpointError, match="mlp_layer_types has 'dense' for layer 1"):
        effective_config(config)
