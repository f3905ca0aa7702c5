"""Names that play no part in a model: by their beginnings, and by the config's counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from parity.verdict import judge
from support.checkpoints import Checkpoint
from vllm_moe_compat.checkpoint.extras import Extras
from vllm_moe_compat.errors import LayoutError

LAYERS = [f"model.layers.{n}.mlp.gate.weight" for n in (0, 1, 2, 10)]
EXPERTS = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in (0, 3, 4, 11)]
OTHERS = ["model.norm.weight", "model.layers.weight", "lm_head.weight", "experts.weight"]
NAMES = [*LAYERS, *EXPERTS, *OTHERS]


def select(extras: Extras, config: dict[str, Any]) -> list[str]:
    return sorted(extras.of(config).select(NAMES))


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 2},
        {"num_layers": 2},
        {"num_hidden_layers": 7, "text_config": {"num_hidden_layers": 2}},
    ],
)
def test_layers_beyond_the_configs_count(config: dict[str, Any]):
    assert select(Extras(beyond_layers=True), config) == sorted(LAYERS[2:])


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_experts_beyond_the_configs_count(key: str):
    assert select(Extras(beyond_experts=True), {key: 4}) == sorted(EXPERTS[2:])


@pytest.mark.parametrize(
    "extras", [Extras(), Extras(beyond_layers=True), Extras(beyond_experts=True)]
)
def test_nothing_is_extra_where_the_config_does_not_count(extras: Extras):
    assert select(extras, {}) == []


@pytest.mark.parametrize("value", ["2", -1, 2.0, True, [2]])
def test_a_count_that_means_nothing_is_refused_only_if_it_is_needed(value: Any):
    config = {"num_hidden_layers": value, "num_experts": value}
    assert select(Extras(), config) == []
    with pytest.raises(LayoutError, match="num_hidden_layers is"):
        Extras(beyond_layers=True).of(config)
    with pytest.raises(LayoutError, match="num_experts is"):
        Extras(beyond_experts=True).of(config)


def test_beginnings_and_parts():
    assert select(Extras(prefixes=("lm_", "experts")), {}) == ["experts.weight", "lm_head.weight"]
    assert select(Extras(parts=("norm.", ".2.")), {}) == [LAYERS[2], "model.norm.weight"]
    # A dot in a part is a dot.
    assert Extras(parts=("mtp.",)).of({}).select(["mtp.a", "mtpa"]) == {"mtp.a"}


def test_together_they_are_all_of_it():
    both = Extras(("a",), ("b",), beyond_layers=True) | Extras(("c",), beyond_experts=True)
    assert both == Extras(("a", "c"), ("b",), beyond_layers=True, beyond_experts=True)
    config = {"num_hidden_layers": 2, "num_experts": 4}
    assert select(both, config) == sorted([*LAYERS[2:], *EXPERTS[2:]])


@pytest.fixture
def _in_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


@pytest.mark.usefixtures("_in_float32")
@pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
def test_layers_beyond_the_count_are_dropped_in_any_state(tmp_path: Path):
    """It may be incomplete, and more than one."""
    cell = build(FAMILIES["deepseek_v3"], FORM_BY_NAME["block FP8"])
    tensors = dict(cell.checkpoint.tensors)
    last = "model.layers.1."
    for name in [name for name in tensors if name.startswith(last)][::2]:
        tensors[name.replace(last, "model.layers.2.")] = tensors[name].clone()
        tensors[name.replace(last, "model.layers.17.")] = tensors[name].clone()
    path = Checkpoint(tensors, cell.checkpoint.config).write(tmp_path)
    found = judge(path, cell.reference, 1e-5)
    assert found.word == "right", found


@pytest.mark.usefixtures("_in_float32")
@pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
def test_experts_beyond_the_count_are_dropped(tmp_path: Path):
    """LongCat's router knows two more, which do nothing."""
    cell = build(FAMILIES["longcat_flash"], FORM_BY_NAME["block FP8"])
    tensors = dict(cell.checkpoint.tensors)
    for name in list(tensors):
        if ".experts.0." in name:
            tensors[name.replace(".experts.0.", ".experts.4.")] = tensors[name].clone()
            tensors[name.replace(".experts.0.", ".experts.5.")] = tensors[name].clone()
    path = Checkpoint(tensors, cell.checkpoint.config).write(tmp_path)
    assert judge(path, cell.reference, 5e-5).word == "right"
