"""An index that describes other files: stale beside a whole MLX upload, else a fault."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest

import vllm_moe_compat
from parity.families import FAMILIES
from parity.reference import reference
from parity.verdict import judge, stock
from support.agreement import check_agreement, planned_loads
from support.loading import load, parameters, same_bits
from support.saved import saved, write
from vllm_moe_compat.checkpoint.index import INDEX
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.errors import CheckpointFileError

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")
NAMES = ("llama", "mixtral", "qwen3_5_moe")


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def upload(name: str, folder: Path, *, mark: bool = True, bits: int = 0, shards: int = 3) -> Path:
    """Write what mlx-lm would upload, in numbered shards, and no index."""
    released = write(folder / "released", *saved(name))
    model, config = mlx_lm.utils.load_model(released)
    if bits:
        model, config = mlx_lm.utils.quantize_model(model, config, 32, bits)
    config.pop("quantization_config", None)
    arrays = list(parameters(model).items())
    out = folder / "upload"
    out.mkdir()
    for n in range(shards):
        file = out / f"model-{n + 1:05}-of-{shards:05}.safetensors"
        metadata = {"format": "mlx"} if mark else {}
        mx.save_safetensors(str(file), dict(arrays[n::shards]), metadata=metadata)
    (out / "config.json").write_text(json.dumps(config))
    return out


def add_index(folder: Path, names: list[str], shards: int) -> None:
    """Write the index of a release with those tensors."""
    files = [f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n in range(len(names))]
    index = {"metadata": {}, "weight_map": dict(zip(names, files, strict=True))}
    (folder / INDEX).write_text(json.dumps(index))


def loads_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with stock():
        wanted = parameters(mlx_lm.utils.load_model(folder)[0])
    with caplog.at_level(logging.WARNING), planned_loads() as plans:
        model = load(folder)
    assert same_bits(parameters(model), wanted)
    assert f"{INDEX}: it does not describe the shards here" in caplog.text
    check_agreement(folder, plans, None)
    (finding,) = (f for f in inspect(str(folder)).findings if f.severity != "note")
    assert (finding.id, finding.severity) == ("index-stale", "warning")


@pytest.mark.parametrize("shards", [2, 3, 7])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_releases_index_beside_converted_shards(
    name: str, bits: int, shards: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Its files have other names, or the same ones."""
    folder = upload(name, tmp_path, bits=bits)
    add_index(folder, list(saved(name)[0]), shards)
    loads_with_a_warning(folder, caplog)


@pytest.mark.parametrize(("name", "bits"), [("llama", 4), ("mixtral", 0), ("qwen3_5_moe", 4)])
def test_shards_without_mlx_lms_mark_are_known_by_their_tensors(
    name: str, bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = upload(name, tmp_path, bits=bits, mark=False)
    add_index(folder, list(saved(name)[0]), 5)
    loads_with_a_warning(folder, caplog)


def refused(folder: Path, words: str) -> None:
    with planned_loads() as plans, pytest.raises(CheckpointFileError, match=words) as caught:
        load(folder)
    check_agreement(folder, plans, str(caught.value))
    first = next(f for f in inspect(str(folder)).findings if f.severity == "error")
    assert first.id in ("index-missing-file", "index-missing-tensor")


@pytest.mark.parametrize("lost", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_shard_of_the_upload_is_missing(name: str, lost: int, tmp_path: Path):
    folder = upload(name, tmp_path)
    add_index(folder, list(saved(name)[0]), 7)
    (folder / f"model-{lost:05}-of-00003.safetensors").unlink()
    refused(folder, f"model-{lost:05}-of-00003.safetensors: no such file")


def test_a_shard_of_a_release_is_missing(tmp_path: Path):
    folder = write(tmp_path, *saved("mixtral"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "no such file is there")


def test_the_uploads_own_index_names_a_file_that_is_missing(tmp_path: Path):
    """In no numbered series; its tensors are in MLX form, so it is not a release's."""
    folder = upload("mixtral", tmp_path)
    names = {}
    for file in sorted(folder.glob("model*.safetensors")):
        names |= dict.fromkeys(mx.load(str(file)), file.name)
    switch = next(name for name in names if ".switch_mlp." in name)
    arrays = mx.load(str(folder / names[switch]))
    rest = {name: array for name, array in arrays.items() if name != switch}
    mx.eval(rest)
    mx.save_safetensors(str(folder / names[switch]), rest, metadata={"format": "mlx"})
    names[switch] = "model-experts.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    refused(folder, "model-experts.safetensors")


def test_a_whole_layer_is_missing(tmp_path: Path):
    """The shards are numbered without a gap, and hold fewer layers than the index."""
    folder = upload("llama", tmp_path, shards=1)
    (file,) = folder.glob("model*.safetensors")
    arrays = {n: a for n, a in mx.load(str(file)).items() if ".layers.1." not in n}
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
    add_index(folder, list(saved("llama")[0]), 4)
    refused(folder, "no such file is there")


def test_the_release_itself_with_another_index_is_refused(tmp_path: Path):
    """Nothing tells that index from one of shards that did not arrive."""
    folder = write(tmp_path, *saved("llama"))
    add_index(folder, list(saved("llama")[0]), 4)
    refused(folder, "no such file is there|does not hold")


def test_an_index_that_fits_is_no_finding(tmp_path: Path):
    folder = write(tmp_path, *saved("llama"))
    assert inspect(str(folder)).findings == []
    assert judge(folder, reference("llama"), FAMILIES["llama"].tolerance).word == "right"
