"""A setting that is fixed, or that nobody has tried: the load and inspect say the same of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from settings.baselines import Config
from settings.sweep import NAMES
from settings.trial import Bench
from support.agreement import check_agreement, planned_loads
from support.loading import load
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.settings_record import record
from vllm_moe_compat.plan.check_settings import check_settings
from vllm_moe_compat.plan.effective_config import resolve
from vllm_moe_compat.probes.recipes import families

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.fixture(autouse=True)
def _hooks() -> Iterator[None]:
    with vllm_moe_compat.applied():
        yield


def fixed() -> Iterator[tuple[Bench, str, bool, Any, Config]]:
    """Yield families with a switch that the module computes in one position only."""
    for name in NAMES:
        bench = Bench(FAMILIES[name])
        kind = bench.resolve(bench.file)["model_type"]
        for setting, found in record()[bench.family.module][kind].items():
            if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], bool):
                continue
            if " (" in setting:  # It is of another kind of rotary embedding.
                continue
            file = bench.changed([((*setting.split("."),), not found[0])])
            try:
                yield bench, setting, not found[0], bench.model(file), file
            except ValueError:  # transformers does not know the value either
                continue


def test_a_fixed_setting_is_refused_by_name(tmp_path: Path):
    for bench, setting, value, model, file in fixed():
        folder = tmp_path / f"{bench.family.name} {setting}"
        bench.save(model, file, folder)
        words = f"{setting} is {value}, where .* computes {not value}; serve"
        with planned_loads() as plans, pytest.raises(UnsupportedCheckpointError, match=words) as e:
            load(folder)
        check_agreement(folder, plans, str(e.value))
    assert list(tmp_path.iterdir())


def test_settings_that_nobody_knows_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    bench = Bench(FAMILIES["qwen3_moe"])
    untried = {("mystery_scale",): 2.0, ("rope_parameters", "mystery_factor"): 3.0}
    off = {("mystery_bias",): False, ("mystery_length",): None}
    file = bench.changed([*untried.items(), *off.items()])
    bench.save(bench.model(bench.file), file, tmp_path)
    with planned_loads() as plans, caplog.at_level(logging.WARNING):
        load(tmp_path)
    check_agreement(tmp_path, plans, None)
    words = "neither transformers nor qwen3_moe reads: "
    words += "rope_parameters.mystery_factor = 3.0, mystery_scale = 2.0"
    assert [warning.message.endswith(words) for warning in plans[0].warnings] == [True]
    assert words in caplog.text


def test_a_setting_that_is_not_recorded_is_a_warning_unless_it_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """transformers' class knows it, and nobody has tried it."""
    bench = Bench(FAMILIES["qwen3_moe"])
    file = bench.changed([(("max_position_embeddings",), 1024), (("rms_norm_eps",), 1e-6)])
    bench.save(bench.model(bench.file), file, tmp_path)
    classes = dict(record()["qwen3_moe"]["qwen3_moe"])
    for name in ("max_position_embeddings", "rms_norm_eps"):  # The latter has its default.
        del classes[name]
    monkeypatch.setitem(record()["qwen3_moe"], "qwen3_moe", classes)
    with planned_loads() as plans:
        load(tmp_path)
    check_agreement(tmp_path, plans, None)
    (warning,) = plans[0].warnings
    assert warning.message.startswith("config.json: max_position_embeddings is 1024, and what ")


def test_without_a_class_of_transformers_keys_that_the_module_does_not_name_are_warnings():
    config = dict(families()["Klear"].release.config) | {"mystery_scale": 2.0}
    faults, warnings = check_settings("mlx_lm.models.Klear", config, resolve(config))
    assert not faults
    (warning,) = warnings
    assert warning.message.endswith("settings that Klear does not read: mystery_scale = 2.0")
