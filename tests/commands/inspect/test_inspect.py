"""What inspect says of sound checkpoints, in every format, and where it finds them."""

from __future__ import annotations

import copy
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import mlx_lm.utils
import pytest

import vllm_moe_compat
from support.inspect_files import checkpoint, shard, tensors, write
from vllm_moe_compat.commands.inspect import as_json, markdown, model, text
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.commands.inspect.model import SCHEMA_VERSION
from vllm_moe_compat.commands.inspect.problems import PROBLEMS
from vllm_moe_compat.commands.main import main
from vllm_moe_compat.plan.effective_config import resolve

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", checkpoint())


def test_a_sound_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in (
        "qwen3_moe (Qwen3MoeForCausalLM)",
        "mlx_lm.models.qwen3_moe (mlx-lm ",
        "block FP8, blocks of 32x32, scales in BF16, 32 weights, quant_method fp8",
        "model.layers.0…1",
        "per-expert",
        "refuses",
        "stack 4 experts, dequantise FP8 with scales per 32x32",
        "none",
    ):
        assert words in out
    assert "\x1b" not in out
    assert not any(line != line.rstrip() for line in out.splitlines())


def test_the_numbers(folder: Path):
    found = inspect(str(folder))
    assert found.verdict == "loads"
    assert found.findings == []
    assert found.experts is not None
    assert [(r.layers, r.form, r.experts, r.dtypes) for r in found.experts.runs] == [
        ("model.layers.0…1", "per-expert", 4, ["F8_E4M3"])
    ]
    assert found.quantization is not None
    assert found.quantization.weights == 2 * (4 + 12)
    # Per layer 12 expert weights, 12 of their scales and 4 of attention's are too many.
    assert found.stock == model.Stock("refuses", found.stock.reasons, 2 * (12 + 4))
    assert found.ours is not None
    assert [(s.made, s.layers) for s in found.ours.steps] == [(0, 0), (6, 2), (8, 2)]
    assert "rms_norm_eps" in found.ours.steps[0].targets
    assert found.memory is not None
    assert [need.setting for need in found.memory.needs] == [
        "none",
        "8bit",
        "mxfp8",
        "6bit",
        "4bit",
    ]
    assert found.memory.cache == [model.CacheKind("softmax", 2, 2 * 4 * 16 * 2 * 2 * 1000)]


def test_memory_is_what_a_load_takes(folder: Path):
    from mlx.utils import tree_flatten

    with vllm_moe_compat.applied(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MOE_COMPAT_DTYPE", "bfloat16")
        loaded, _ = mlx_lm.utils.load_model(_complete(folder))
        memory = inspect(str(folder)).memory
    held = sum(array.nbytes for _, array in tree_flatten(loaded.parameters()))
    assert memory is not None
    assert memory.needs[0].weights == held


def _complete(folder: Path) -> Path:
    """Add what a Qwen3-MoE must have to be loaded, and inspect does not ask for."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "norm_topk_prob": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "numpy") as file:
        specs = {
            n: (file.get_slice(n).get_dtype(), list(file.get_slice(n).get_shape()))
            for n in file.offset_keys()
        }
    for layer in range(2):
        for norm in "qk":
            specs[f"model.layers.{layer}.self_attn.{norm}_norm.weight"] = ("BF16", [16])
    header, data = tensors(specs)
    shard(folder / "model.safetensors", json.dumps(header).encode(), data)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def test_layers_that_are_unlike(tmp_path: Path):
    files = checkpoint(layers=5)
    header = files["model.safetensors"]["shard"]
    for layer in (0, 1, 3):
        for name in [n for n in header if f"layers.{layer}.mlp" in n]:
            del header[name]
    found = inspect(str(write(tmp_path, _laid_out(files))))
    assert found.experts is not None
    assert [(run.layers, run.form) for run in found.experts.runs] == [
        ("model.layers.0…1,3", "dense"),
        ("model.layers.2,4", "per-expert"),
    ]


def _laid_out(files: dict[str, Any]) -> dict[str, Any]:
    header = files["model.safetensors"]["shard"]
    header, data = tensors({n: (e["dtype"], e["shape"]) for n, e in header.items()})
    files["model.safetensors"] = {"shard": header, "data": data}
    files["model.safetensors.index.json"]["json"]["weight_map"] = dict.fromkeys(
        header, "model.safetensors"
    )
    return files


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("kind", ["mtp", "vision"])
def test_extras_and_what_the_config_says(tmp_path: Path, kind: str, there: bool, says: bool):
    files = checkpoint()
    config = files["config.json"]["json"]
    files["config.json"]["json"] = config = {
        "model_type": "qwen3_5_moe",
        "text_config": config | {"model_type": "qwen3_5_moe_text"},
    }
    if says and kind == "mtp":
        config["text_config"]["mtp_num_hidden_layers"] = 1
    elif says:
        config["vision_config"] = {"depth": 1}
    if there:
        name = {"mtp": "mtp.fc.weight", "vision": "model.visual.blocks.0.norm1.weight"}[kind]
        files["model.safetensors"]["shard"][name] = {"dtype": "BF16", "shape": [4, 4]}
    found = inspect(str(write(tmp_path, _laid_out(files))))
    extras = [extra for extra in found.extras if extra.kind == kind]
    assert len(extras) == (there or says)
    for extra in extras:
        assert (extra.tensors, extra.in_config, extra.agree) == (there, says, there == says)
        assert extra.loaded == 0
    assert [f.id for f in found.findings] == ([f"{kind}-disagree"] if there != says else [])
    assert found.exit_code == 0


def test_a_repository_of_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    home = tmp_path / "home"
    cached = home / "hub" / "models--org--name"
    snapshot = cached / "snapshots" / "0123abcd"
    (cached / "blobs").mkdir(parents=True)
    (cached / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abcd")
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cached / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(home))
    for name in ("org/name", "org/name@main", "org/name@0123abcd", str(cached)):
        found = inspect(name)
        assert found.path == str(snapshot)
        assert found.findings == []
        assert found.exit_code == 0
    where = huggingface_hub.snapshot_download(
        "org/name", cache_dir=str(home / "hub"), local_files_only=True
    )
    assert where == str(snapshot)
    assert inspect("org/name").repository == "org/name"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["inspect", "org/name"]) == 2


def test_a_link_that_leaves(folder: Path, tmp_path: Path):
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to("../elsewhere")
    found = inspect(str(folder))
    assert [(f.id, f.severity) for f in found.findings] == [("link-outside", "warning")]
    assert found.exit_code == 0


@pytest.mark.parametrize(
    "name", ["nothing/here", "a/b/c", "../nowhere", "", "\0", "x" * 5000, "org/name@../../etc"]
)
def test_what_is_not_there(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vllm-moe-compat: ")
    assert err.count("\n") == 1


def test_another_file_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(folder / "config.json")]) == 2
    assert "name the checkpoint's folder" in capsys.readouterr().err


def test_the_only_shard_is_the_checkpoint(folder: Path):
    both = [inspect(str(path)) for path in (folder / "model.safetensors", folder)]
    # What memory is free may change in between.
    assert replace(both[0], memory=None) == replace(both[1], memory=None)


def test_one_shard_of_several(folder: Path):
    header, data = tensors({"model.extra.weight": ("BF16", [4])})
    shard(folder / "model-2.safetensors", json.dumps(header).encode(), data)
    found = inspect(str(folder / "model-2.safetensors"))
    assert found.files is not None
    assert found.files.tensors == 1
    assert [finding.id for finding in found.findings] == ["single-file"]
    assert (found.verdict, found.exit_code) == ("unknown", 0)


def test_a_shard_beside_the_index(folder: Path):
    header, data = tensors({"model.layers.0.strange.weight": ("BF16", [4])})
    shard(folder / "model-extra.safetensors", json.dumps(header).encode(), data)
    found = inspect(str(folder))
    assert [finding.id for finding in found.findings] == ["index-extra"]
    assert "model.layers.0.strange.weight" in found.findings[0].message


def test_a_model_without_a_row(folder: Path):
    header, data = tensors({"model.layers.0.mlp.experts.0.up_proj.weight": ("BF16", [4, 4])})
    shard(folder / "model.safetensors", json.dumps(header).encode(), data)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    found = inspect(str(folder))
    assert {f.id for f in found.findings} == {"module-unmapped", "experts-unmapped"}
    assert (found.verdict, found.exit_code) == ("unknown", 0)
    assert found.stock is not None
    assert found.stock.verdict == "unknown"


def test_own_code_is_not_looked_into(folder: Path):
    config = json.loads((folder / "config.json").read_text()) | {"model_file": "model.py"}
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(str(folder))
    assert [f.id for f in found.findings] == ["own-code"]
    assert found.verdict == "unknown"


def test_a_form_of_mlx_is_left_alone(tmp_path: Path):
    files = checkpoint()
    config = files["config.json"]["json"]
    files["config.json"]["json"] = resolve(config) | config  # As mlx-lm saves it: complete.
    files["config.json"]["json"]["quantization"] = {"bits": 4, "group_size": 64}
    del files["config.json"]["json"]["quantization_config"]
    prefix = "model.layers.0.mlp.switch_mlp"
    header, data = tensors(
        {
            f"{prefix}.{part}_proj.{name}": spec
            for part in ("gate", "up", "down")
            for name, spec in {
                "weight": ("U32", [4, 64, 8]),
                "scales": ("BF16", [4, 64, 1]),
                "biases": ("BF16", [4, 64, 1]),
            }.items()
        }
    )
    for entry in header.values():
        entry["dtype"] = "U8" if entry["dtype"] == "U32" else entry["dtype"]
    files["model.safetensors"] = {"shard": header, "data": data}
    del files["model.safetensors.index.json"]
    found = inspect(str(write(tmp_path, files)))
    assert found.ours == model.PluginResult("loads", [], found.ours.workarounds)
    assert found.quantization is not None
    assert found.quantization.form == "MLX affine 4-bit g64"
    assert found.stock is not None
    assert found.stock.verdict == "loads"
    assert found.memory is not None
    assert [need.setting for need in found.memory.needs] == ["none"]


def test_the_setting_in_force(folder: Path, monkeypatch: pytest.MonkeyPatch):
    needs = "vllm_moe_compat.commands.inspect.needs.host_memory"
    monkeypatch.setattr(needs, lambda: (10**5, 10**4))
    found = inspect(str(folder))
    assert [(f.id, f.severity) for f in found.findings] == [("memory", "warning")]
    assert found.exit_code == 0
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "3bit")
    assert main(["inspect", str(folder)]) == 2


def test_the_module_is_the_one_that_mlx_lm_picks():
    from vllm_moe_compat.families import modules
    from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE, row_for

    source = modules.mlx_lm()
    assert source.by_type == mlx_lm.utils.MODEL_REMAPPING
    assert source.by_architecture == mlx_lm.utils.MODEL_ARCHITECTURE_REMAPPING
    assert source.version == mlx_lm.__version__
    kinds = [row.rpartition(".")[2] for row in TRANSFORMS_BY_MODULE]
    configs: list[dict[str, Any]] = [
        *({"model_type": kind} for kind in [*kinds, *mlx_lm.utils.MODEL_REMAPPING, "nothing"]),
        *(
            {"model_type": kind, "architectures": ["Other", name]}
            for kind, name in mlx_lm.utils.MODEL_ARCHITECTURE_REMAPPING
        ),
        {"model_type": "bailing_hybrid", "architectures": "BailingMoeV3ForCausalLM"},
    ]
    for config in configs:
        found = modules.find(config)
        try:
            model_class, _ = mlx_lm.utils._get_classes(config)
        except ValueError:
            assert (found.path, found.row) == ("", None), config
            continue
        assert found.row is row_for(model_class), config
        assert found.row is None or found.row.module == model_class.__module__


HEAVY = ("mlx", "mlx.core", "mlx_lm", "torch", "vllm")
HIDDEN = (*HEAVY, "transformers", "huggingface_hub")


@pytest.mark.parametrize("hidden", [(), HIDDEN])
@pytest.mark.parametrize("kind", ["text", "json", "markdown"])
def test_nothing_heavy_is_imported(folder: Path, hidden: tuple[str, ...], kind: str):
    code = f"""
import sys
for name in {hidden!r}: sys.modules[name] = None
from vllm_moe_compat.commands.inspect import command as inspect
import argparse
parser = argparse.ArgumentParser()
inspect.add_arguments(parser)
args = parser.parse_args([{str(folder)!r}, "--format", {kind!r}])
args.own_process = True
code = inspect.run(args)
heavy = {{name for name in {HEAVY!r} if sys.modules.get(name) is not None}}
assert not heavy, heavy
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "mlx_lm.models.qwen3_moe" in done.stdout.replace("\\", "")
    assert ("not installed" in done.stdout or '"mlx_lm": null' in done.stdout) == bool(hidden)
    assert ("transformers is not installed" in done.stdout) == bool(hidden)


@pytest.mark.full
def test_a_terminal_without_unicode(folder: Path):
    code = "import argparse as a, sys\nfrom vllm_moe_compat.commands.inspect import command\n"
    code += f"sys.exit(command.run(a.Namespace(checkpoint={str(folder)!r}, format='text')))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert b"model.layers.0?1" in done.stdout


def test_a_terminal_of_eighty_columns(folder: Path):
    main_end, terminal = pty.openpty()
    code = "import argparse as a, sys\nfrom vllm_moe_compat.commands.inspect import command\n"
    code += f"sys.exit(command.run(a.Namespace(checkpoint={str(folder)!r}, format='text')))"
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": ""}
    with subprocess.Popen([sys.executable, "-c", code], stdout=terminal, env=environment) as child:
        os.close(terminal)
        out = b""
        with suppress(OSError):  # which Linux raises where the other end is closed
            while more := os.read(main_end, 65536):
                out += more
    os.close(main_end)
    assert child.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.decode())
    assert plain != out.decode()
    lines = plain.splitlines()
    assert max(map(len, lines)) <= 80 or str(folder) in max(lines, key=len)
    assert "mlx_lm.models.qwen3_moe" in plain


def test_a_kind_of_finding_that_is_everywhere(tmp_path: Path):
    files = checkpoint(layers=20)
    header = files["model.safetensors"]["shard"]
    for layer in range(20):
        del header[f"model.layers.{layer}.mlp.experts.{layer % 3}.up_proj.weight"]
        shape = [layer + 1, layer + 1]
        header[f"model.layers.{layer}.self_attn.q_proj.weight_scale_inv"]["shape"] = shape
    found = inspect(str(write(tmp_path, _laid_out(files))))
    scales = [f.message for f in found.findings if f.id == "fp8-scales"]
    assert len(scales) == 9
    assert scales[-1].endswith("more of this kind")


def test_a_config_that_speaks_of_experts_that_are_not_there(tmp_path: Path):
    files = checkpoint()
    header = files["model.safetensors"]["shard"]
    for name in [name for name in header if ".experts." in name]:
        del header[name]
    found = inspect(str(write(tmp_path, _laid_out(files))))
    assert [finding.id for finding in found.findings] == ["experts-none"]


def test_more_tensors_than_any_checkpoint_has(folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = inspect(str(folder))
    assert found.files is not None
    monkeypatch.setattr("vllm_moe_compat.checkpoint.headers.MAX_TENSORS", found.files.tensors)
    assert inspect(str(folder)).exit_code == 0
    monkeypatch.setattr("vllm_moe_compat.checkpoint.headers.MAX_TENSORS", found.files.tensors - 1)
    assert inspect(str(folder)).findings[0].id == "headers-too-large"
    monkeypatch.undo()
    monkeypatch.setattr("vllm_moe_compat.checkpoint.headers.MAX_HEADERS", 1000)
    assert inspect(str(folder)).findings[0].id == "headers-too-large"


def test_the_json_keeps_to_its_schema(folder: Path, tmp_path: Path):
    schema = as_json.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (folder, folder / "model.safetensors", broken):
        jsonschema.validate(json.loads(as_json.render(inspect(str(path)))), schema)
    assert schema["properties"]["schema_version"] == {"const": SCHEMA_VERSION}
    described = {"Inspection": schema, **schema["$defs"]}
    for name, known in vars(model).items():
        if is_dataclass(known):
            names = [field.name for field in fields(known)]
            assert list(described[name]["properties"]) == names
            assert described[name]["required"] == names
    assert schema["$defs"]["Problem"]["properties"]["id"]["enum"] == list(PROBLEMS)


def test_names_are_never_markup(tmp_path: Path):
    files = copy.deepcopy(checkpoint())
    evil = "[red]|`@someone` <b>\x1b[31m\u202e"
    files["config.json"]["json"]["architectures"] = [evil]
    found = inspect(str(write(tmp_path, files)))
    plain, pasted = text.render(found), markdown.render(found)
    assert "[red]|`@someone` <b>?[31m?" in plain
    assert "\x1b" not in plain + pasted
    assert "\\[red\\]\\|\\`\\@someone\\` \\<b\\>" in pasted


def test_data_that_no_memory_holds_are_not_read(tmp_path: Path):
    header, data = tensors({"model.norm.weight": ("F32", [2**40])})
    shard(tmp_path / "model.safetensors", json.dumps(header).encode(), data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = inspect(str(tmp_path))
    assert found.files is not None
    assert found.files.tensor_bytes == 2**42
    assert [finding.id for finding in found.findings] == ["memory"]


def test_a_shard_that_may_not_be_read(folder: Path):
    (folder / "model.safetensors").chmod(0)
    found = inspect(str(folder))
    if os.geteuid() == 0:  # who may read everything
        assert found.exit_code == 0
    else:
        assert found.exit_code == 2
        assert found.findings[0].id == "shard-unreadable"
        assert "Permission denied" in found.findings[0].message


def test_the_docs_list_every_finding():
    page = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    rows = {line for line in page.splitlines() if line.startswith("| `")}
    for id, (severity, meaning) in PROBLEMS.items():
        assert f"| `{id}` | {severity} | {meaning} |" in rows
    assert f"`schema_version` is {SCHEMA_VERSION}" in page
