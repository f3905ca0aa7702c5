"""Output heads beside tied embeddings: what transformers computes, or a refusal.

``tie_word_embeddings`` says one thing and the tensors another. Every family is tried in every
contradiction, against ``from_pretrained`` of the same folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from safetensors.torch import load_file

import vllm_moe_compat
from parity.families import FAMILIES
from parity.reference import State, reference
from parity.verdict import judge, stock
from support.agreement import check_agreement, planned_loads
from support.loading import load
from support.saved import oracle, saved, write
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.commands.main import main
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.families.row import NEVER_TIED

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

EMBEDDINGS = ("embed_tokens.weight", "embeddings.weight", "backbone.embedding.weight")
CASES = ("tied", "copy", "different", "head alone", "untied without a head")
# One for each way in which a module makes logits, and each place where names may be.
EVERY_DAY = {
    "llama",
    "olmoe",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "gemma2",
    "gemma3",
    "gemma4",
    "hunyuan_v1_moe",
    "kimi_k25",
    "kimi_linear",
    "lfm2",
    "minicpm3",
    "mistral3",
    "nemotron_h",
    "phimoe",
}
# transformers refuses a tied config, or these modules have no row.
NONE = {"dbrx"}
NEVER = {
    name
    for name, family in FAMILIES.items()
    if (row := TRANSFORMS_BY_MODULE.get(f"mlx_lm.models.{family.module}")) is not None
    and row.head == NEVER_TIED
}


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def contradiction(name: str, case: str) -> tuple[State, dict[str, Any]]:
    """Return a family's checkpoint with tensors and config of the case."""
    tensors, config = saved(name)
    (embedding,) = (n for n in tensors if n.endswith(EMBEDDINGS) and "vis" not in n)
    heads = [n for n in tensors if n.endswith("lm_head.weight")]
    outer = "language_model." if embedding.startswith("language_model.") else ""
    head = heads[0] if heads else f"{outer}lm_head.weight"
    different = tensors[head] if heads else tensors[embedding].flip(0).clone()
    if case in ("tied", "untied without a head"):
        tensors.pop(head, None)
    else:
        tensors[head] = tensors[embedding].clone() if case == "copy" else different
    if case == "head alone":
        del tensors[embedding]
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section["tie_word_embeddings"] = case != "untied without a head"
    return tensors, config


def cells() -> list[Any]:
    return [
        pytest.param(name, case, marks=() if name in EVERY_DAY else pytest.mark.full)
        for name in FAMILIES
        if " " not in name and name not in NONE
        for case in CASES
    ]


@pytest.mark.parametrize(("name", "case"), cells())
def test_the_head_is_that_of_transformers(name: str, case: str, tmp_path: Path):
    family = FAMILIES[name]
    folder = write(tmp_path, *contradiction(name, case))
    with planned_loads() as plans:
        found = judge(folder, oracle(folder, name), family.tolerance)
    refusal = found.why if found.word == "refused" else None
    lacks = case in ("tied", "head alone") and name in NEVER
    if case == "untied without a head" and found.word != "refused":
        # The module ties whatever the config says, and transformers makes a random head.
        row = TRANSFORMS_BY_MODULE[f"mlx_lm.models.{family.module}"]
        assert row.head == "if stored", found
    elif case == "untied without a head" or (lacks and case == "tied"):
        assert "no tensor" in found.why, found
        check_agreement(folder, plans, refusal)
    elif lacks:
        assert found.word == "refused", found
    else:
        assert found.word == "right", found
        check_agreement(folder, plans, None)
        check_stock(folder, name)


def check_stock(folder: Path, name: str) -> None:
    """See that inspect does not promise more of mlx-lm by itself than it does."""
    said = inspect(str(folder)).stock
    assert said is not None
    with stock():
        upstream = judge(folder, oracle(folder, name), FAMILIES[name].tolerance)
    allowed = {"loads": {"right"}, "refuses": {"refused"}, "wrong": {"wrong"}}
    assert upstream.word in allowed.get(said.verdict, {upstream.word}), (said, upstream)


def test_a_head_that_differs_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = write(tmp_path, *contradiction("llama", "different"))
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "lm_head.weight is an output head that differs from model.embed_tokens" in caplog.text
    (finding,) = inspect(str(folder)).findings
    assert (finding.id, finding.severity) == ("head-differs", "warning")


def test_a_copy_stored_in_another_dtype_is_used(tmp_path: Path):
    tensors, config = contradiction("llama", "copy")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].float()
    folder = write(tmp_path, tensors, config)
    assert judge(folder, oracle(folder, "llama"), 1e-5).word == "right"


def test_a_difference_in_the_last_byte_is_seen(tmp_path: Path):
    """In tensors that are longer than what is compared at once."""
    tensors, config = contradiction("llama", "copy")
    rows = 20_000
    grown = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    tensors |= {"model.embed_tokens.weight": grown, "lm_head.weight": grown.clone()}
    tensors["lm_head.weight"][-1, -1] += 1
    folder = write(tmp_path, tensors, config | {"vocab_size": rows})
    assert [f.id for f in inspect(str(folder)).findings] == ["head-differs"]
    tensors["lm_head.weight"] = grown.clone()
    folder = write(tmp_path / "same", tensors, config | {"vocab_size": rows})
    assert inspect(str(folder)).findings == []


def test_a_config_that_says_nothing_of_tying(tmp_path: Path):
    """mlx-lm's llama ties by default, and drops the head."""
    tensors, config = saved("llama")
    del config["tie_word_embeddings"]
    folder = write(tmp_path, tensors, config)
    assert judge(folder, reference("llama"), 1e-5).word == "right"


@pytest.mark.parametrize("setting", ["8bit", "4bit"])
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_a_head_of_its_own_is_quantised_like_another(
    name: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The layers are the same; so the logits are those of the untied checkpoint."""
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", setting)
    tensors, config = contradiction(name, "different")
    tied = load(write(tmp_path / "tied", tensors, config))
    untied = load(write(tmp_path / "untied", tensors, config | {"tie_word_embeddings": False}))
    tokens = mx.array([[3, 1, 4, 1, 5]])
    assert mx.array_equal(tied(tokens), untied(tokens))
    assert "scales" in tied.lm_head


@pytest.mark.parametrize("name", ["llama", "gemma2", "hunyuan_v1_moe"])
def test_an_mlx_conversion_keeps_the_head(name: str, tmp_path: Path):
    """A packed head beside packed embeddings."""
    folder = write(tmp_path / "in", *contradiction(name, "different"))
    wanted = oracle(folder, name)
    code = main(["convert", str(folder), str(tmp_path / "out"), "--dtype", "float32"])
    if name != "llama":
        # mlx-lm alone has no head there.
        assert code == 1
        return
    assert code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert judge(tmp_path / "out", wanted, 1e-5).word == "right"


def test_a_published_form_keeps_the_decision(tmp_path: Path):
    folder = write(tmp_path / "in", *contradiction("qwen3_moe", "different"))
    wanted = oracle(folder, "qwen3_moe")
    out = tmp_path / "out"
    command = ["convert", str(folder), str(out), "--layout", "combined", "--dtype", "float32"]
    assert main(command) == 0
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert judge(out, wanted, 1e-5).word == "right"


def test_a_published_form_of_a_copy_is_tied(tmp_path: Path):
    folder = write(tmp_path / "in", *contradiction("qwen3_moe", "copy"))
    out = tmp_path / "out"
    command = ["convert", str(folder), str(out), "--layout", "combined", "--dtype", "float32"]
    assert main(command) == 0
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert "lm_head.weight" not in names
    assert judge(out, oracle(folder, "qwen3_moe"), 1e-5).word == "right"


def test_a_head_in_fp8_is_used(tmp_path: Path):
    tensors, config = contradiction("qwen3_moe", "different")
    head = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    plain = write(tmp_path / "plain", tensors | {"lm_head.weight": head.float() * 0.5}, config)
    stored = tensors | {"lm_head.weight": head, "lm_head.weight_scale": torch.tensor(0.5)}
    config |= {"quantization_config": {"quant_method": "fp8"}}
    folder = write(tmp_path / "fp8", stored, config)
    assert judge(folder, oracle(plain, "qwen3_moe"), 1e-5).word == "right"
