"""The effective config: what is filled in, what is refused, and whose word counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import vllm_moe_compat
from parity.families import FAMILIES
from parity.family import Family
from parity.reference import GRAIN, TOKENS, Reference, new_model
from parity.verdict import judge
from support.as_read import as_read, is_complete
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.commands.main import main
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.arguments import REQUIRED, arguments
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.release_defaults import CLASS_OF, RELEASE_DEFAULTS
from vllm_moe_compat.plan.effective_config import effective_config, resolve

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

Config = dict[str, Any]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.fixture
def _hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


# The arguments of mlx-lm's modules, read from their source.


@pytest.mark.parametrize("module", TRANSFORMS_BY_MODULE)
def test_the_source_gives_the_arguments_that_the_class_has(module: str):
    read = arguments(module)
    assert read is not None
    live = mlx_lm.utils.importlib.import_module(module).ModelArgs
    fields = live.__dataclass_fields__
    own = read.whole or read.text
    assert list(own) == list(fields)
    assert {k for k, v in own.items() if v is REQUIRED} == {
        name
        for name, field in fields.items()
        if type(field.default).__name__ == type(field.default_factory).__name__ == "_MISSING_TYPE"
    }


@pytest.mark.parametrize(("kind", "size"), [(None, 18), ("mistral4", 31), ("ministral3", 14)])
def test_a_module_may_choose_its_arguments_by_the_sections_type(kind: str | None, size: int):
    read = arguments("mlx_lm.models.mistral3", kind)
    assert read is not None
    assert len(read.text) == size


# Whose word counts.


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"model_type": "qwen2"}, {"rope_theta": 10000.0, "tie_word_embeddings": False}),
        ({"model_type": "qwen2", "rope_theta": 5.0}, {"rope_theta": 5.0}),
        ({"model_type": "qwen2", "rope_parameters": {"rope_theta": 5.0}}, {"rope_theta": 5.0}),
        (
            {"model_type": "qwen2", "rope_theta": 7.0, "rope_parameters": {"rope_theta": 5.0}},
            {"rope_theta": 5.0},
        ),
        ({"model_type": "kimi_k2"}, {"routed_scaling_factor": 2.5, "n_group": 8}),
        ({"model_type": "gpt_oss", "rope_scaling": None}, {"rope_scaling": None}),
        (
            {"model_type": "bailing_moe", "architectures": ["BailingMoeV2ForCausalLM"]},
            {"score_function": "sigmoid", "use_qk_norm": True, "rope_theta": 600000.0},
        ),
        (
            {"model_type": "qwen3_vl", "rope_theta": 5.0, "tie_word_embeddings": True},
            {"rope_theta": 5.0, "tie_word_embeddings": True},
        ),
    ],
)
def test_the_file_counts_and_then_the_class(config: Config, wanted: Config):
    filled = {"num_experts": 4, "intermediate_size": 8, "num_key_value_heads": 4}
    filled |= {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
    found = as_read(effective_config(SIZES | filled | config).config)
    assert {key: found[key] for key in wanted} == wanted


def test_what_equals_the_modules_default_is_not_written():
    made = effective_config(SIZES | {"model_type": "qwen2", "intermediate_size": 8})
    assert "max_position_embeddings" not in made.config
    assert "max_position_embeddings" not in made.translated
    assert made.settings["max_position_embeddings"] == 32768


@pytest.mark.parametrize("kind", [*RELEASE_DEFAULTS, *CLASS_OF])
def test_recorded_defaults_are_of_arguments_that_a_module_reads(kind: str):
    config = {"model_type": "hunyuan" if kind == "hunyuan" else "bailing_moe"}
    if kind in CLASS_OF:
        assert resolve({"model_type": kind, **SIZES})["rms_norm_eps"] > 0
    else:
        assert as_read(config).keys() >= RELEASE_DEFAULTS[kind].keys()


NESTED = [
    f
    for f in FAMILIES.values()
    if f.outer is not None and " " not in f.name and f.name not in ("gemma3", "gemma4", "step3p7")
]


@pytest.mark.usefixtures("_hooks")
@pytest.mark.parametrize("inner", [True, False, None])
@pytest.mark.parametrize("family", NESTED, ids=lambda family: family.name)
def test_the_top_level_says_whether_the_head_is_tied(
    family: Family, inner: bool | None, tmp_path: Path
):
    model = new_model(family, False, GRAIN)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    if family.name == "minimax_m3_vl" and inner:
        return  # Its class takes either section's word for tying.
    config["text_config"].pop("tie_word_embeddings", None)
    if inner is not None:
        config["text_config"]["tie_word_embeddings"] = inner
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = judge(tmp_path, Reference({}, {}, config, logits), family.tolerance)
    assert found.word == "right", found
    assert resolve(config)["tie_word_embeddings"] is False


# What is refused, in one sentence.


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen3_moe", "num_attention_heads": "x"}, "num_attention_heads is 'x'"),
        ({"model_type": "qwen3_moe", "hidden_size": []}, r"hidden_size is \[\]"),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 2**70}, "num_hidden_layers is 1180"),
        ({"model_type": "gemma3", "text_config": {"head_dim": "x"}}, "head_dim is 'x'"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 1e999}}, "num_hidden"),
        ({"model_type": "jamba", "attn_layer_period": 0}, "attn_layer"),
        ({"model_type": "gemma3", "hidden_size": 64}, "text_config is missing"),
        ({"model_type": "Klear", "hidden_size": 64}, "num_hidden_layers, intermediate_size.* are"),
    ],
)
def test_a_config_that_the_class_refuses_is_one_sentence(config: Config, words: str):
    before = deepcopy(config)
    with pytest.raises(UnsupportedCheckpointError, match=rf"^config\.json: .*{words}") as raised:
        effective_config(config)
    assert "\n" not in str(raised.value)
    assert config == before


@pytest.mark.usefixtures("_hooks")
def test_a_missing_argument_is_said_by_load_inspect_and_convert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {"model_type": "Klear", "architectures": ["KlearForCausalLM"], **SIZES}
    assert not is_complete(config)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.norm.weight": np.ones(64, dtype=np.float32)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sentence = r"config\.json: intermediate_size, attention_bias, .* are missing, which "
    with pytest.raises(UnsupportedCheckpointError, match=sentence):
        mlx_lm.utils.load_model(folder)
    report = inspect(str(folder))
    assert report.verdict == "refuses"
    assert any(re.search(sentence, finding.message) for finding in report.findings)
    assert main(["convert", str(folder), str(tmp_path / "made")]) == 1
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "made").exists()


def test_every_class_reads_what_it_writes():
    """The settings are those of transformers, not a selection."""
    config = transformers.Qwen3Config(**SIZES, rope_parameters={"rope_theta": 5.0})
    assert resolve(config.to_dict()) | {"dtype": None} == config.to_dict() | {"dtype": None}
