"""What needs a whole model is refused for one whose experts are on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from support.adapters import write_adapter
from support.loading import TOKENS, load, new_model, parameters, read, same_bits
from vllm_moe_compat.errors import SettingError

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

CACHE = "VLLM_MOE_COMPAT_EXPERT_CACHE"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"]).write(folder)


def test_a_copy_without_its_experts_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    monkeypatch.setenv(CACHE, "50%")
    with vllm_moe_compat.applied():
        model = load(source)
        with pytest.raises(SettingError, match=r"CACHE=50%.* nothing was written.* off to write"):
            mlx_lm.utils.save_model(copy, model)
        with pytest.raises(SettingError, match="nothing was written"):
            model.save_weights(str(copy.with_suffix(".safetensors")))
        assert list(tmp_path.iterdir()) == [source]

        monkeypatch.setenv(CACHE, "off")
        whole = load(source)
        mlx_lm.utils.save_model(copy, whole)
        whole.save_weights(str(copy.with_suffix(".safetensors")))
    assert (copy / "model.safetensors").stat().st_size > 0
    assert copy.with_suffix(".safetensors").stat().st_size > 0


def test_another_number_form_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "50%")
    with vllm_moe_compat.applied():
        model = load(source)
        before = parameters(model)
        with pytest.raises(SettingError, match=r"CACHE=50%.* number form .* nothing was changed"):
            mlx_lm.utils.quantize_model(model, {}, 32, 4)
        with pytest.raises(SettingError, match="nothing was changed"):
            mlx_lm.utils.dequantize_model(model)
        assert same_bits(parameters(model), before)

        monkeypatch.setenv(CACHE, "off")
        mlx_lm.utils.quantize_model(whole := load(source), {}, 32, 4)
        assert any(name.endswith("scales") for name in parameters(whole))


def test_weights_for_experts_on_disk_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``strict=False`` would leave them out without a word."""
    with vllm_moe_compat.applied():
        weights = list(parameters(load(source)).items())
        monkeypatch.setenv(CACHE, "50%")
        model = load(source)
        file = str(tmp_path / "weights.safetensors")
        mx.save_safetensors(file, dict(weights))
        for given, strict in ((weights, False), (iter(weights), False), (weights, True)):
            with pytest.raises(SettingError, match=r"so model\.layers.*switch_mlp.*off to change"):
                model.load_weights(given, strict=strict)
        with pytest.raises(
            SettingError, match=r"weights\.safetensors: .*so model\.layers.*switch_mlp"
        ):
            model.load_weights(file, strict=False)
        with pytest.raises(SettingError, match=r"so switch_mlp\.down_proj\.weight cannot"):
            model.layers[0].mlp.load_weights(
                [("switch_mlp.down_proj.weight", mx.zeros(3))], strict=False
            )
        others = [(name, 2 * array) for name, array in weights if "switch_mlp" not in name]
        model.load_weights(others)
        assert same_bits(parameters(model), dict(others))


def test_an_adapter_is_right_over_attention_and_refused_over_experts_on_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        experts = write_adapter(load(source), tmp_path / "experts")
        attention = write_adapter(load(source), tmp_path / "attention", ["self_attn.q_proj"])
        whole = load(source)
        plain = whole(mx.array([TOKENS]))
        wanted = mlx_lm.utils.load_adapters(whole, str(attention))(mx.array([TOKENS]))
        assert not mx.array_equal(plain, wanted).item()
        monkeypatch.setenv(CACHE, "50%")
        model = load(source)
        with pytest.raises(
            SettingError, match=r"adapters\.safetensors: .*lora_.*nothing was loaded"
        ):
            mlx_lm.utils.load_adapters(model, str(experts))
        adapted = mlx_lm.utils.load_adapters(model, str(attention))
        assert mx.array_equal(adapted(mx.array([TOKENS])), wanted).item()


def test_a_call_of_sanitize_alone_says_that_settings_have_no_effect(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with vllm_moe_compat.applied():
        for name, value in ((CACHE, "50%"), ("VLLM_MOE_COMPAT_QUANTIZE", "8bit")):
            model = new_model(json.loads((source / "config.json").read_text()))
            monkeypatch.setenv(name, value)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                model.sanitize(read(source))
            assert f"{name}={value} is without effect" in caplog.text
            monkeypatch.delenv(name)


def test_reverting_gives_upstreams_functions_back() -> None:
    with vllm_moe_compat.applied():
        vllm_moe_compat.revert()
        before = mlx_lm.utils.save_model, nn.Module.save_weights, nn.Module.load_weights
        assert before[1].__module__ == "mlx.nn.layers.base"
        vllm_moe_compat.apply()
        now = mlx_lm.utils.save_model, nn.Module.save_weights, nn.Module.load_weights
        assert all(one is not other for one, other in zip(before, now, strict=True))
        vllm_moe_compat.revert()
        assert before == (mlx_lm.utils.save_model, nn.Module.save_weights, nn.Module.load_weights)
