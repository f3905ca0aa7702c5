"""A model whose experts are on disk, when the files there change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from support.loading import TOKENS, load
from vllm_moe_compat.errors import CheckpointFileError
from vllm_moe_compat.expert_cache.install import containers

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "60%")
    with vllm_moe_compat.applied():
        yield


def logits(model: Any) -> mx.array:
    found: mx.array = model(mx.array([TOKENS]))
    mx.eval(found)
    return found


@pytest.mark.parametrize("form", ["release", "block FP8", "NVFP4", "GPTQ"])
def test_a_changed_file_ends_the_call_by_name_until_it_is_put_back(form: str, tmp_path: Path):
    folder = build(FAMILIES["qwen3_moe"], FORM_BY_NAME[form]).write(tmp_path)
    model = load(folder)
    assert containers(model)
    wanted = logits(model)
    (file,) = folder.glob("model*.safetensors")
    content, status = file.read_bytes(), file.stat()
    path = r"expert \d of model\.layers\.\d\.mlp\.switch_mlp"
    for change in (lambda: os.truncate(file, len(content) // 2), file.touch):
        change()
        with pytest.raises(CheckpointFileError, match=f"^{path}: {file.name}: .*; (check|put) "):
            logits(model)
        with file.open("r+b") as same:
            same.write(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert mx.array_equal(logits(model), wanted).item()
    file.unlink()
    with pytest.raises(CheckpointFileError, match=f"^{path}: {file.name}: .*now there is none"):
        logits(model)


def test_the_files_of_a_relative_path_are_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build(FAMILIES["qwen3_moe"], FORM_BY_NAME["release"]).write(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    model = load(Path(tmp_path.name))
    wanted = logits(model)
    monkeypatch.chdir("/")
    assert mx.array_equal(logits(model), wanted).item()
