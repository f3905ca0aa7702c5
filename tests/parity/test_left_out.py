"""What config.json leaves out has transformers' default, not that of mlx-lm's module.

Every family as its tiny config says, and with everything but sizes at the class's defaults: then
the base of the rotary embedding, tying, epsilons and factors are among what may be left out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vllm_moe_compat
from parity.families import FAMILIES
from parity.family import Family
from parity.reference import GRAIN, TOKENS, Reference, new_config, new_model
from parity.release import release_config
from parity.verdict import judge
from support.as_read import as_read
from support.cells import one_in
from vllm_moe_compat.plan.config_class import config_class
from vllm_moe_compat.plan.effective_config import effective_config

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

Config = dict[str, Any]
OWN = [f for f in FAMILIES.values() if "mixed" not in f.name and f.module != "dbrx"]
BARE = [f for f in OWN if " " not in f.name]
# Where the class's defaults ask for what the module does not compute, whatever is left out.
OTHER_FAULTS = {
    "gpt_oss": "yarn without truncation",
    "hunyuan_v1_moe": "a head of its own",
    "kimi_k25": "a tied head",
    "minicpm3": "a tied head is not scaled",
    "phimoe": "projections without bias",
    "starcoder2": "the activation",
}
# Sections and marks, which are not settings, and what some modules read under two names.
KEPT = ("model_type", "text_config", "vision_config", "architectures", "dtype", "layers_block_type")
# Their classes ignore what releases say in other words, and the modules read it.
OWN_WORDS = ("apertus", "gpt_oss", "phimoe longrope", "step3p7")


class Bare(Family):
    """A family with nothing but sizes."""

    def settings(self, ragged: bool = False) -> Config:
        settings = super().settings(ragged)
        for section in (settings, settings.get("text_config", {})):
            for key in [*section]:
                value = section[key]
                size = isinstance(value, int | list) and not isinstance(value, bool)
                nested = isinstance(value, dict) and key != "rope_parameters"
                if not size and not nested and key != "model_type":
                    del section[key]
        return settings


def bare(family: Family) -> Family:
    return Bare(**{field.name: getattr(family, field.name) for field in fields(family)})


def leave_out(cls: Any, config: Config, keys: tuple[str, ...] = ()) -> tuple[Config, list[str]]:
    """Return the config without what the class reads the same without, and what that was."""
    whole = cls.from_dict(_numbers(cls, config)).to_dict()
    rest, gone = deepcopy(config), []
    for section in (rest.get("text_config", {}), rest):
        for key in [*section]:
            if key in KEPT or (keys and key not in keys):
                continue
            value = section.pop(key)
            if _same(cls, rest, whole):
                gone.append(key)
            else:
                section[key] = value
    return rest, gone


def _same(cls: Any, config: Config, whole: Config) -> bool:
    try:
        return bool(cls.from_dict(_numbers(cls, config)).to_dict() == whole)
    except Exception:  # noqa: BLE001 - the class has checks of its own
        return False  # It cannot be left out.


def _numbers(cls: Any, config: Config) -> Config:
    return cls._decode_special_floats(deepcopy(config))


def _full(family: Family) -> Any:
    """Leave a case to the full lane."""
    return pytest.param(family, marks=pytest.mark.full)


def saved(family: Family) -> tuple[Any, Config]:
    config = new_config(family)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        file = json.loads(Path(folder, "config.json").read_text())
    return type(config), _numbers(type(config), file)  # As mlx-lm reads it.


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    "family",
    [_full(bare(f)) for f in BARE if f.name not in OTHER_FAULTS] + one_in(3, OWN),
    ids=lambda family: f"{family.name} {type(family).__name__}",
)
def test_the_logits_stay_those_of_transformers(family: Family, tmp_path: Path):
    model = new_model(family, False, GRAIN)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    assert np.isfinite(logits).all()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rest, gone = leave_out(type(model.config), config)
    assert len(gone) > 3
    file.write_text(json.dumps(rest))
    found = judge(tmp_path, Reference({}, {}, config, logits), 2 * family.tolerance)
    assert found.word == "right", (found, gone)


@pytest.mark.parametrize(
    "family",
    [_full(bare(f)) for f in BARE] + one_in(3, OWN),
    ids=lambda family: f"{family.name} {type(family).__name__}",
)
def test_the_module_reads_the_same_without_any_one_of_them(family: Family):
    cls, config = saved(family)
    _, gone = leave_out(cls, config)
    wanted = as_read(effective_config(config).config)
    for key in gone:
        rest, _ = leave_out(cls, config, (key,))
        assert as_read(effective_config(rest).config) == wanted, key


@pytest.mark.parametrize(
    "family", [f for f in OWN if f.name not in OWN_WORDS], ids=lambda family: family.name
)
def test_a_release_may_leave_them_out_too(family: Family):
    _, config = saved(family)
    config = release_config(family.base, config)
    found = config_class(config)
    if found is None:
        assert family.name == "kimi_vl"
        return
    wanted = as_read(effective_config(config).config)
    for key in leave_out(found.cls, config)[1]:
        rest, _ = leave_out(found.cls, config, (key,))
        assert as_read(effective_config(rest).config) == wanted, key
