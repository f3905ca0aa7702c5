"""Names that no module knows: brought to the module's, or refused before a tensor is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_moe_compat
from parity.families import FAMILIES, LEFT_OUT
from parity.forms import FORM_BY_NAME, build
from parity.reference import State, reference
from parity.verdict import judge, stock
from support.agreement import check_agreement, planned_loads
from support.loading import load
from support.saved import saved, write
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.commands.main import main
from vllm_moe_compat.errors import CheckpointFileError, LayoutError, UnsupportedCheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

NAMES = ("llama", "qwen3_moe", "qwen3_5_moe", "nemotron_h", "kimi_k25", "gemma4", "mistral3")


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def compiled(name: str) -> str:
    return name.replace(".self_attn.", "._orig_mod.self_attn.")


def doubled(name: str) -> str:
    return name if "lm_head" in name else f"model.{name}"


WRAPPED: dict[str, Callable[[str], str]] = {
    "DDP": "module.{}".format,
    "compiled": "_orig_mod.{}".format,
    "compiled layers": compiled,
    "PEFT": "base_model.model.{}".format,
    "DDP around compiled": "module._orig_mod.{}".format,
    "doubled": doubled,
    "a trainer's own": "policy.{}".format,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LEFT_OUT])
def test_a_wrappers_names_are_brought_to_the_models(name: str, wrapper: str, tmp_path: Path):
    tensors, config = saved(name)
    tensors = {WRAPPED[wrapper](old): value for old, value in tensors.items()}
    folder = write(tmp_path, tensors, config)
    with planned_loads() as plans:
        found = judge(folder, reference(name), FAMILIES[name].tolerance)
    assert found.word == "right", found
    check_agreement(folder, plans, None)
    said = inspect(str(folder)).stock
    assert said is not None
    with stock():
        upstream = judge(folder, reference(name), FAMILIES[name].tolerance)
    assert (said.verdict == "refuses") == (upstream.word == "refused"), (said, upstream)
    changed = tensors.keys() != saved(name)[0].keys()
    changed |= any(".embedding.weight" in name for name in tensors)  # as transformers 5.12 saves
    assert ("bring names" in str(inspect(str(folder)).ours)) == changed


@pytest.mark.parametrize("name", ["llama tied", "qwen3_5 tied", "gemma2"])
def test_a_base_model_saved_without_its_head(name: str, tmp_path: Path):
    base = name.partition(" ")[0]
    tensors, config = saved(base)
    tensors.pop("lm_head.weight", None)
    for section in (config, config.get("text_config", {})):
        section["tie_word_embeddings"] = True
    whole = write(tmp_path / "whole", tensors, config)
    alone = {old.removeprefix("model."): value for old, value in tensors.items()}
    folder = write(tmp_path / "alone", alone, config)
    with planned_loads() as plans:
        model = load(folder)
    check_agreement(folder, plans, None)
    from support.loading import parameters, same_bits

    assert same_bits(parameters(model), parameters(load(whole)))


def test_fp8_experts_under_a_wrappers_names(tmp_path: Path):
    cell = build(FAMILIES["qwen3_moe"], FORM_BY_NAME["block FP8"])
    tensors = {f"module.{name}": value for name, value in cell.checkpoint.tensors.items()}
    folder = write(tmp_path, tensors, cell.checkpoint.config)
    with planned_loads() as plans:
        found = judge(folder, cell.reference, 1e-5)
    assert found.word == "right", found
    check_agreement(folder, plans, None)


@pytest.mark.parametrize("options", [[], ["--layout", "combined"]])
def test_convert_writes_the_models_names(options: list[str], tmp_path: Path):
    tensors, config = saved("qwen3_moe")
    folder = write(tmp_path / "in", {f"module.{n}": v for n, v in tensors.items()}, config)
    assert main(["convert", str(folder), str(tmp_path / "out"), *options]) == 0
    written: State = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert not any(name.startswith("module.") for name in written)
    assert judge(tmp_path / "out", reference("qwen3_moe"), 1e-5).word == "right"


def test_sanitize_alone_brings_them_too():
    """Without a config: some callers give tensors alone."""
    import mlx.core as mx

    from support.loading import new_model

    tensors, config = saved("olmoe")
    config |= {"rope_theta": 1e4, "rope_scaling": None}
    model = new_model(config)
    given = {f"module.{n}": mx.array(v.numpy()) for n, v in tensors.items()}
    wanted = new_model(config).sanitize({n: mx.array(v.numpy()) for n, v in tensors.items()})
    assert model.sanitize(given).keys() == wanted.keys()


ADAPTERS = {
    "LoRA": "model.layers.0.self_attn.q_proj.lora_A.weight",
    "LoRA of PEFT": "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight",
    "its base": "model.layers.0.self_attn.k_proj.base_layer.weight",
    "mlx-lm's": "model.layers.0.self_attn.q_proj.lora_a",
}


def refused(folder: Path, error: type[Exception]) -> str:
    """Load, see the refusal, and that inspect and convert say the same."""
    with planned_loads() as plans, pytest.raises(error) as caught:
        load(folder)
    check_agreement(folder, plans, str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "qwen3_5_moe"])
def test_an_unmerged_adapter_is_refused(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tensors, config = saved(name)
    folder = write(tmp_path / "in", tensors | {ADAPTERS[kind]: torch.ones(4, 64)}, config)
    told = refused(folder, UnsupportedCheckpointError)
    assert ADAPTERS[kind] in told
    assert "merge_and_unload" in told
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 1
    assert "merge_and_unload" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapters.safetensors"])
@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_with_an_adapter_alone(file: str, with_config: bool, tmp_path: Path):
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, tmp_path / file)
    (tmp_path / "adapter_config.json").write_text("{}")
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(saved("llama")[1]))
    with pytest.raises(CheckpointFileError, match=r"an adapter alone.*merge_and_unload") as caught:
        load(tmp_path)
    report = inspect(str(tmp_path))
    assert report.exit_code == 2
    (found,) = (f for f in report.findings if f.id == "adapter-alone")
    assert found.message in str(caught.value)


def test_an_adapter_beside_the_weights_is_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tensors, config = saved("llama")
    folder = write(tmp_path, tensors, config)
    save_file({"q.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    with caplog.at_level(logging.WARNING), planned_loads() as plans:
        found = judge(folder, reference("llama"), 1e-5)
    assert found.word == "right"
    assert "adapter_model.safetensors: an adapter lies beside" in caplog.text
    check_agreement(folder, plans, None)
    (finding,) = inspect(str(folder)).findings
    assert (finding.id, finding.severity) == ("adapter-beside", "warning")


NEOX = {
    "gpt_neox.embed_in.weight": (96, 64),
    **{
        f"gpt_neox.layers.{n}.{name}": shape
        for n in range(2)
        for name, shape in {
            "attention.query_key_value.weight": (192, 64),
            "mlp.dense_h_to_4h.weight": (256, 64),
            "input_layernorm.weight": (64,),
        }.items()
    },
    "embed_out.weight": (96, 64),
}


@pytest.mark.parametrize("root", ["gpt_neox.", "model.", "transformer."])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "gemma3"])
def test_another_models_tensors_are_refused(name: str, root: str, tmp_path: Path):
    _, config = saved(name)
    tensors = {n.replace("gpt_neox.", root): torch.ones(shape) for n, shape in NEOX.items()}
    told = refused(write(tmp_path, tensors, config), LayoutError)
    assert "expected" in told


def test_a_prefix_of_some_tensors_is_refused(tmp_path: Path):
    tensors, config = saved("llama")
    mixed = {n if "lm_head" in n else f"module.{n}": value for n, value in tensors.items()}
    assert "do not begin as those of llama" in refused(write(tmp_path, mixed, config), LayoutError)


@pytest.mark.parametrize(
    ("change", "words"),
    [("module.{}".format, "prefix of a wrapper"), ("{}.lora_A.weight".format, "adapter")],
)
def test_a_module_without_a_row_is_refused_too(
    change: Callable[[str], str], words: str, tmp_path: Path
):
    tensors, config = saved("llama")
    config["model_type"] = "gemma"
    folder = write(tmp_path, {change(n): v for n, v in tensors.items()}, config)
    assert words in refused(folder, ValueError)
