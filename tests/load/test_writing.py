"""A model whose experts are on disk is not written without them."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn
import mlx_lm.utils
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from support.loading import load
from vllm_moe_compat.errors import SettingError

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


def test_a_copy_without_its_experts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"]).write(source)
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "50%")
    with vllm_moe_compat.applied():
        model = load(source)
        with pytest.raises(SettingError, match=r"CACHE=50%.* nothing was written.* off to write"):
            mlx_lm.utils.save_model(copy, model)
        with pytest.raises(SettingError, match="nothing was written"):
            model.save_weights(str(copy.with_suffix(".safetensors")))
        assert list(tmp_path.iterdir()) == [source]

        monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "off")
        whole = load(source)
        mlx_lm.utils.save_model(copy, whole)
        whole.save_weights(str(copy.with_suffix(".safetensors")))
    assert (copy / "model.safetensors").stat().st_size > 0
    assert copy.with_suffix(".safetensors").stat().st_size > 0


def test_reverting_gives_upstreams_functions_back() -> None:
    with vllm_moe_compat.applied():
        vllm_moe_compat.revert()
        before = mlx_lm.utils.save_model, nn.Module.save_weights
        assert before[1].__module__ == "mlx.nn.layers.base"
        vllm_moe_compat.apply()
        assert before != (mlx_lm.utils.save_model, nn.Module.save_weights)
        vllm_moe_compat.revert()
        assert before == (mlx_lm.utils.save_model, nn.Module.save_weights)
