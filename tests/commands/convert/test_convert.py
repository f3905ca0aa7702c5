"""What is converted loads without the plugin, bit for bit as with it, in bounded memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx.utils import tree_unflatten

import vllm_moe_compat
from support.checkpoints import Checkpoint, Fp8, Sizes, build
from support.loading import TOKENS, load, new_model, parameters, read, same_bits
from support.rewriting import layout_to
from vllm_moe_compat.checkpoint.headers import read_headers
from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.commands.convert import command
from vllm_moe_compat.commands.convert.conversion import Options, convert
from vllm_moe_compat.commands.main import main
from vllm_moe_compat.errors import CheckpointFileError
from vllm_moe_compat.execute import stack
from vllm_moe_compat.plan.packing import QUANTIZE_SETTINGS
from vllm_moe_compat.rewrite.shards import Shards
from vllm_moe_compat.rewrite.written_layout import LAYOUTS, WrittenLayout

SIZES = Sizes(hidden=128, intermediate=64)
ALIGNED = Sizes(hidden=256, intermediate=128)
SETTINGS = ("none", *QUANTIZE_SETTINGS)
STOCK = """
import json, sys
import mlx.core as mx, mlx_lm.utils, numpy as np
from pathlib import Path
from mlx.utils import tree_flatten

tokens, folders = json.loads(sys.argv[1]), sys.argv[2:]
for folder in map(Path, folders):
    model, _ = mlx_lm.utils.load_model(folder)
    mx.save_safetensors(str(folder / "found.safetensors"), dict(tree_flatten(model.parameters())))
    np.save(folder / "logits.npy", np.array(model(mx.array([tokens]))[0].astype(mx.float32)))
assert not [name for name in sys.modules if name.startswith("vllm")]
"""


def checkpoint(folder: Path, **settings: Any) -> Path:
    made = build(**({"fp8": Fp8(), "sizes": SIZES, "mtp": True, "vision": True} | settings))
    path = made.write(folder)
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("hello")
    (path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    (path / "pytorch_model.bin").write_text("no")
    if made.config.get("quantization_config"):
        (path / "hf_quant_config.json").write_text("{}")
    return path


def plugin(path: Path, setting: str, dtype: str = "bfloat16") -> Any:
    with pytest.MonkeyPatch.context() as patch, vllm_moe_compat.applied():
        patch.setenv("VLLM_MOE_COMPAT_QUANTIZE", setting)
        patch.setenv("VLLM_MOE_COMPAT_DTYPE", dtype)
        return load(path)


def cast(model: Any, dtype: mx.Dtype) -> None:
    """As mlx_lm.convert does it."""
    may = getattr(model, "cast_predicate", lambda name: True)
    floats = {n: a for n, a in parameters(model).items() if may(n) and a.dtype != mx.uint32}
    model.update(tree_unflatten([(n, a.astype(dtype)) for n, a in floats.items()]))


def logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each setting, and what a process without the plugin makes of it."""
    root = tmp_path_factory.mktemp("converted")
    found = {setting: root / setting for setting in SETTINGS}
    for setting, target in found.items():
        # Without dtype the CPU could multiply no experts; it is what the plugin does, too.
        dtype = "float32" if setting == "none" else ""
        convert(source, target, Options(setting=setting, dtype=dtype))
    words = [sys.executable, "-c", STOCK, json.dumps(TOKENS), *map(str, found.values())]
    subprocess.run(words, check=True, timeout=200)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_stock_mlx_lm_loads_it_and_computes_what_the_plugin_does(
    setting: str, converted: dict[str, Path], source: Path
):
    dtype = "float32" if setting == "none" else "bfloat16"
    model = plugin(source, setting, dtype)
    if setting == "none":
        cast(model, mx.float32)
    folder = converted[setting]
    assert same_bits(mx.load(str(folder / "found.safetensors")), parameters(model))
    assert np.array_equal(np.load(folder / "logits.npy"), logits(model))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_folder_is_as_mlx_lm_would_have_saved_it(setting: str, converted: dict[str, Path]):
    folder = converted[setting]
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert not names & {"pytorch_model.bin", "hf_quant_config.json"}
    assert not [name for name in names if "of" in name]
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == [7]
    packing = QUANTIZE_SETTINGS.get(setting)
    for key in ("quantization", "quantization_config"):
        assert (key in config) == (packing is not None)
        if packing is not None:
            assert config[key]["bits"] == packing.bits
            assert config[key]["mode"] == packing.mode
    headers = read_headers(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == headers.keys()
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "mlx"}
    ends = [e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"]
    assert index["metadata"]["total_size"] == max(ends)


@pytest.mark.parametrize(
    ("form", "setting"),
    [
        *(("per-expert", "none"), ("combined", "8bit")),
        pytest.param("per-expert", "8bit", marks=pytest.mark.full),
        pytest.param("combined", "none", marks=pytest.mark.full),
    ],
)
def test_without_a_dtype_it_is_what_a_load_gives_and_with_one_everything_is_of_it(
    form: str, setting: str, tmp_path: Path
):
    for fp8 in (Fp8(), None):
        path = checkpoint(tmp_path / f"{fp8}", form=form, fp8=fp8)
        convert(path, tmp_path / f"{fp8}a", Options(setting=setting))
        found = parameters(load(tmp_path / f"{fp8}a"))
        assert same_bits(found, parameters(plugin(path, setting)))

        convert(path, tmp_path / f"{fp8}b", Options(setting=setting, dtype="float16"))
        model = plugin(path, "none", "float16")
        cast(model, mx.float16)
        if setting != "none":
            config = {"model_type": "qwen3_5_moe"}
            model, _ = mlx_lm.utils.quantize_model(model, config, 64, 8)
        found = parameters(load(tmp_path / f"{fp8}b"))
        assert same_bits(found, parameters(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_comes_back_from_floats_with_the_same_bytes(dtype: str, tmp_path: Path):
    path = checkpoint(tmp_path / "source", sizes=ALIGNED, fp8=Fp8(scale=torch.float32))
    convert(path, tmp_path / "mlx", Options(dtype=dtype))
    form = layout_to(block=(128, 128))
    convert(tmp_path / "mlx", tmp_path / "back", Options(layout=form))
    wanted, found = read(path), read(tmp_path / "back")
    headers = read_headers(tmp_path / "back")
    experts = [n for n in wanted if ".mlp.experts." in n and n.endswith("_proj.weight")]
    experts = [n for n in experts if not n.startswith("mtp.")]
    assert len(experts) == 4 * 4 * 3
    for name in experts:
        back = name.replace("model.language_model.", "language_model.model.")
        assert headers[back].dtype == "F8_E4M3"
        assert mx.array_equal(found[back], wanted[name]).item()
        ours, theirs = found[f"{back}_scale_inv"], wanted[f"{name}_scale_inv"]
        # bfloat16 holds eight bits of a product; from float32 the very scale comes back.
        limit = 0 if dtype == "float32" else 2**-8
        assert mx.max(mx.abs(ours / theirs - 1)).item() <= limit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_goes_to_every_published_form_and_back_without_losing_a_bit(
    layout: str, tmp_path: Path
):
    path = checkpoint(tmp_path / "source", sizes=ALIGNED)
    convert(
        path, tmp_path / "there", Options(layout=layout_to(layout, block=(128, 128)), verify=True)
    )
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    described = config["quantization_config"]
    assert described["weight_block_size"] == [128, 128]
    headers = read_headers(tmp_path / "there")
    kept = described["modules_to_not_convert"]
    assert "lm_head" in kept
    assert all(headers[f"{module}.weight"].dtype != "F8_E4M3" for module in kept)
    plain = {n for n, i in headers.items() if i.dtype == "BF16" and len(i.shape) > 1}
    plain = {n for n in plain if not n.endswith("_scale_inv")}
    assert {f"{module}.weight" for module in kept} == plain
    with vllm_moe_compat.applied():
        assert same_bits(parameters(load(tmp_path / "there")), parameters(load(path)))
    convert(tmp_path / "there", tmp_path / "back", Options(layout=layout_to(block=(128, 128))))
    wanted = {n: a for n, a in read(path).items() if not n.startswith(("mtp.", "model.visual."))}
    assert same_bits(read(tmp_path / "back"), wanted)


def test_other_blocks_and_scales_say_what_they_are(tmp_path: Path):
    path = checkpoint(tmp_path / "source", sizes=ALIGNED, fp8=None)
    forms = {
        "row": layout_to(block=(1, 0)),
        "tensor": layout_to(block=(0, 0)),
        "e8m0": layout_to("combined", block=(64, 64), e8m0=True),
    }
    wanted = parameters(plugin(path, "none", "float32"))
    for name, form in forms.items():
        target = tmp_path / name
        convert(path, target, Options(layout=form))
        headers = read_headers(target)
        # Experts and the larger projections; no router, no embedding.
        chosen = {n.rpartition(".layers.")[2] for n, i in headers.items() if i.dtype == "F8_E4M3"}
        assert "3.self_attn.q_proj.weight" in chosen
        assert not [n for n in chosen if "gate." in n or "embed" in n]
        found = parameters(plugin(target, "none", "float32"))
        assert found.keys() == wanted.keys()
        for key, array in found.items():
            error = array.astype(mx.float32) - wanted[key]
            # Half of E4M3's last place is 1/16 of a number at most, and less on average.
            assert mx.mean(error**2).item() <= 0.04**2 * mx.mean(wanted[key] ** 2).item(), key
    described = {
        n: json.loads((tmp_path / n / "config.json").read_text())["quantization_config"]
        for n in forms
    }
    assert described["row"]["quant_method"] == "compressed-tensors"
    assert described["e8m0"]["scale_fmt"] == "ue8m0"
    assert "weight_block_size" not in described["tensor"]
    kinds = {i.dtype for n, i in read_headers(tmp_path / "e8m0").items() if "scale" in n}
    assert kinds == {"F8_E8M0"}


@pytest.mark.parametrize(
    ("fp8", "form", "setting"),
    [
        pytest.param(Fp8(), None, "none", marks=pytest.mark.full),
        (None, None, "4bit"),
        (Fp8(), layout_to("combined", block=(128, 128)), "none"),
        pytest.param(None, layout_to("per-expert", block=(1, 0)), "none", marks=pytest.mark.full),
    ],
    ids=["floats", "packed", "moved", "quantised"],
)
def test_the_peak_does_not_grow_with_the_model(
    form: WrittenLayout | None, setting: str, fp8: Fp8 | None, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(stack, "TEMPORARY_BYTES", 2**16)
    peaks, sizes = [], []
    for layers in (4, 12):
        size = Sizes(hidden=256, intermediate=128, experts=8, layers=layers)
        path = build(fp8=fp8, sizes=size).write(tmp_path / f"s{layers}", shards=3)
        gc.collect()
        mx.clear_cache()
        target = tmp_path / f"t{layers}"
        report = convert(path, target, Options(layout=form, setting=setting))
        peaks.append(report.peak)
        sizes.append(report.written)
        assert report.written == sum(a.nbytes for a in read(target).values())
    assert sizes[1] > 2.8 * sizes[0]
    # What the process still frees of earlier work moves it a little.
    assert peaks[1] < 1.5 * peaks[0]
    # One layer's projection as floats, and what it is made of; a layer has three.
    assert peaks[1] < 3 * 8 * 256 * 128 * 4 + 2**20


def test_shards_are_no_larger_than_wanted(source: Path, tmp_path: Path):
    report = convert(source, tmp_path / "out", Options(shard_bytes=100_000))
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) == report.shards > 5
    largest = max(a.nbytes for a in read(tmp_path / "out").values())
    for file in files:
        found = mx.load(str(file))
        assert sum(a.nbytes for a in found.values()) <= 100_000 or len(found) == 1
    assert largest < 100_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_a_byte_that_changed_on_the_disk_is_found(tmp_path: Path):
    shards = Shards(tmp_path, {"a": Spec("F32", (2, 3)), "b": Spec("BF16", ())}, 100, "mlx")
    shards.write("b", mx.array(1.0, dtype=mx.bfloat16))
    with pytest.raises(RuntimeError, match="a was not written"):
        shards.finish()
    shards.write("a", mx.arange(6, dtype=mx.float32).reshape(3, 2).T)
    shards.finish()
    shards.verify()
    assert np.array_equal(read(tmp_path)["a"], [[0, 2, 4], [1, 3, 5]])
    with pytest.raises(RuntimeError, match="not Spec"):
        shards.write("a", mx.zeros((3, 2)))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(CheckpointFileError, match="other bytes"):
        shards.verify()


def test_what_mlx_lm_computes_otherwise_is_said(tmp_path: Path):
    """Jamba's router is corrected by the plugin, on the instance: no tensor can carry that."""
    config = {
        "model_type": "jamba",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_offset": 0,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "vocab_size": 96,
        "tie_word_embeddings": True,
    }
    tensors = {
        name: torch.zeros(array.shape) for name, array in parameters(new_model(config)).items()
    }
    path = Checkpoint(tensors, config).write(tmp_path / "source")
    report = convert(path, tmp_path / "out", Options())
    (note,) = report.notes
    assert "feed_forward does not compute as the model was trained" in note


def test_the_command_says_what_it_did(source: Path, tmp_path: Path, capsys):
    args = ["--quantize", "4bit", "--max-shard-size", "300KB", "--verify"]
    assert main(["convert", str(source), str(tmp_path / "out"), *args]) == 0
    said = capsys.readouterr()
    assert "MLX form, 4bit; read " in said.out
    assert "peak" in said.out
    assert said.err == ""


@pytest.mark.parametrize(
    ("words", "size"), [("5GB", 5e9), ("1.5MiB", 1.5 * 2**20), ("200", 200), ("3k", 3000)]
)
def test_sizes_are_read_as_people_write_them(words: str, size: float):
    assert command._bytes(words) == size
