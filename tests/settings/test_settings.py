"""The record of settings is what a sample of the sweep shows, and refuses nothing that is right.

The whole sweep is the lane ``.ci/settings``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import vllm_moe_compat
from parity.families import FAMILIES
from parity.family import Family
from parity.reference import new_config
from settings.baselines import Baseline
from settings.record import FILE, RIGHT, put_in, refused_by, render
from settings.sweep import NAMES, ROWLESS, trials
from settings.trial import Bench, without_record
from support.models import _COMMON
from support.models import FAMILIES as SERVED
from vllm_moe_compat.families import modules
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.settings_record import (
    PUT_IN,
    WORDS,
    allows,
    class_of,
    classes_of,
    named_settings,
    record,
)
from vllm_moe_compat.plan.check_settings import check_settings
from vllm_moe_compat.plan.effective_config import resolve
from vllm_moe_compat.probes.recipes import families

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
SAMPLE = 2
"""Trials of each family, chosen by a checksum of setting and value."""


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_the_trials_agrees_with_the_record(name: str):
    bench = Bench(FAMILIES[name])
    found = sorted(trials(bench, Baseline(""), bench.file), key=lambda trial: _checksum(*trial))
    agreed = 0
    for path, value in found:
        file = bench.changed([(path, value)])
        with without_record():
            outcome, _ = bench.run(file, None)
        if outcome.word in ("invalid", "fails", "refused"):
            continue
        row = {
            "module": bench.family.module,
            "kind": bench.resolve(bench.file)["model_type"],
            "settings": dict(named_settings(bench.resolve(file))),
        }
        refused = refused_by(record(), row)
        assert (outcome.word in RIGHT) == (not refused), (path, value, outcome, refused)
        agreed += 1
        if agreed == SAMPLE:
            break
    assert agreed == SAMPLE


def _checksum(path: tuple[str, ...], value: Any) -> int:
    return zlib.crc32(json.dumps([path, value]).encode())


def test_the_record_is_of_modules_with_rows_and_of_words_that_exist():
    kinds = {(family.module, _kind(family)) for family in map(FAMILIES.__getitem__, NAMES)}
    assert {(module, kind) for module, own in record().items() for kind in own} == kinds
    for module, own in record().items():
        assert f"mlx_lm.models.{module}" in TRANSFORMS_BY_MODULE
        for classes in own.values():
            for name, found in classes.items():
                assert isinstance(found, list) or found in WORDS or _is_negative(found), name
    assert FILE.read_text() == render(record())


def _is_negative(found: Any) -> bool:
    return isinstance(found, dict) and list(found) in (["not"], ["without"], ["as"])


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_family_has_a_class(name: str):
    family = FAMILIES[name]
    settings = Bench(family).resolve(Bench(family).file)
    classes = classes_of(family.module, settings["model_type"])
    assert not [n for n, _ in named_settings(settings) if class_of(classes, n) is None]


def test_what_is_put_in_is_what_the_fixes_of_the_row_say():
    for module, own in record().items():
        for classes in own.values():
            said = {name for name, found in classes.items() if found == PUT_IN}
            put = put_in(module)
            assert all(any(name.startswith(p) for p in put) for name in said), (module, said, put)


def _kind(family: Family) -> str:
    config = new_config(family).get_text_config(decoder=True)
    return str(config.model_type)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ROWLESS])
def test_no_family_or_variant_is_refused(name: str, tmp_path: Path):
    family = FAMILIES[name]
    new_config(family).save_pretrained(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text())
    assert not _refusals(f"mlx_lm.models.{family.module}", file)


@pytest.mark.parametrize("name", families())
def test_no_recorded_config_is_refused_or_warned_of(name: str):
    family = families()[name]
    for config in (family.release.config, family.saved):
        if config is not None:
            tried = family.module in record()
            assert not _refusals(f"mlx_lm.models.{family.module}", dict(config), warnings=tried)


@pytest.mark.parametrize("name", SERVED)
def test_no_served_model_is_refused(name: str):
    stem, extra = SERVED[name]
    config = getattr(transformers, f"{stem}Config")(**(_COMMON | extra)).to_dict()
    row = modules.row_of_config(config)
    assert row is not None
    assert not _refusals(row.module, config, warnings=True)


def _refusals(module: str, file: dict[str, Any], warnings: bool = False) -> list[str]:
    faults, warned = check_settings(module, file, resolve(file))
    return [found.message for found in faults + (warned if warnings else [])]


DEFAULTS_REFUSED = {
    ("phimoe", "attention_bias"): "releases have biases",
    ("phimoe", "lm_head_bias"): "releases have biases",
}
"""Module and setting whose default the module does not compute, with the reason."""


@pytest.mark.parametrize("name", NAMES)
def test_no_default_of_a_config_class_is_refused(name: str):
    family = FAMILIES[name]
    made = type(new_config(family).get_text_config(decoder=True))()
    classes = classes_of(family.module, made.model_type)
    named = dict(named_settings(made.to_dict()))
    wrong = {n: v for n, v in named.items() if not allows(class_of(classes, n), v, named)}
    assert {(family.module, setting) for setting in wrong} <= DEFAULTS_REFUSED.keys(), wrong
