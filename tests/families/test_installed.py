"""Rows make up for what an older module lacks, by its source; the newest lacks nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_moe_compat.families import installed, modules
from vllm_moe_compat.families.fixes.older_attention import VALUE_SCALE
from vllm_moe_compat.families.released_settings import is_released
from vllm_moe_compat.plan import check_settings
from vllm_moe_compat.plan.check_settings import check_settings as check

Lay = Callable[[str, str], Path]


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lay:
    """Return a function that puts a copy of mlx-lm in force whose module lacks a word."""

    def lay(module: str, word: str) -> Path:
        source = installed.package_folder()
        assert source is not None
        shutil.copytree(source / "models", tmp_path / "models")
        file = tmp_path / "models" / f"{module}.py"
        assert word in file.read_text()
        file.write_text(file.read_text().replace(word, "other"))
        monkeypatch.setattr(installed, "package_folder", lambda: tmp_path)
        found = modules.MlxLm("0", tmp_path / "models")
        monkeypatch.setattr(check_settings, "mlx_lm", lambda: found)
        for cached in (installed.lacks, check_settings._words):
            cached.cache_clear()
        return tmp_path

    yield lay
    for cached in (installed.lacks, check_settings._words):
        cached.cache_clear()


def test_the_source_says_what_a_module_lacks(without: Lay):
    given = ("mimo_v2_flash", "attention_value_scale", "it is not read", VALUE_SCALE)
    assert installed.older(*given) == ()
    without("mimo_v2_flash", "attention_value_scale")
    assert installed.older(*given) == (VALUE_SCALE,)
    assert installed.older("no_such_module", "a word", "why", 1) == ()


def test_the_newest_modules_lack_nothing():
    assert len(installed.OLDER) > 10
    amiss = [old for old in installed.OLDER if installed.lacks(old.module, old.sign)]
    assert not amiss, "the fixes of these are applied where they are not needed"


def test_a_setting_that_the_installed_module_does_not_read_is_refused(without: Lay):
    config = {"model_type": "mimo_v2_flash", "attention_value_scale": 0.5}
    module = "mlx_lm.models.mimo_v2_flash"
    assert not is_released("attention_value_scale", 0.5)
    settings = dict(config)
    assert check(module, config, settings)[0] == []
    without("mimo_v2_flash", "attention_value_scale")
    (fault,), _ = check(module, config, settings)
    assert fault.message == (
        "config.json: attention_value_scale is 0.5, which the installed mlx-lm's mimo_v2_flash "
        "does not read"
    )
    assert check(module, config, settings, {"attention_value_scale"})[0] == []
    assert check(module, config, settings | {"attention_value_scale": None})[0] == []
