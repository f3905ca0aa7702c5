"""The target is there as a whole or not at all, and nothing is written over."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from support.checkpoints import Fp8, Sizes, build
from support.loading import read, same_bits
from vllm_moe_compat.commands.convert.conversion import Options, convert
from vllm_moe_compat.commands.main import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(fp8=Fp8(), sizes=Sizes(64, 32)).write(tmp_path_factory.mktemp("source"))


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that a refusal is."""
    assert main(["convert", *words]) == code
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


def test_what_cannot_be_read_or_written_to_is_said_in_one_line(
    source: Path, tmp_path: Path, capsys
):
    here, new = str(source), str(tmp_path / "new")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "plain").write_text("mine")
    config_only = tmp_path / "config-only"
    config_only.mkdir()
    (config_only / "config.json").write_text("{}")
    cases = {
        (here, str(taken)): "exists already",
        (here, str(tmp_path / "plain")): "exists already",
        (here, here): "lies in",
        (here, f"{here}/inside"): "lies in",
        (str(tmp_path / "none"), new): "does not exist",
        (f"{here}/model-00001-of-00002.safetensors", new): "is one file",
        (str(empty), new): "no config.json",
        (str(config_only), new): r"no model*.safetensors",
        (here, new, "--layout", "combined", "--quantize", "8bit"): "leave one of them out",
        (here, new, "--scale-dtype", "e8m0"): "add --fp8",
        (here, new, "--layout", "combined", "--scale-dtype", "e8m0"): "add --fp8",
        (here, new, "--fp8", "128"): "a block such as 128x128",
    }
    for words, part in cases.items():
        assert part in refused(list(words), capsys), words
    assert (taken / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_refusal_in_the_middle_leaves_nothing(source: Path, tmp_path: Path, capsys, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    file = broken / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "not a readable safetensors" in refused([str(broken), str(tmp_path / "out")], capsys)
    monkeypatch.setenv("VLLM_MOE_COMPAT", "0")
    assert "switches off" in refused([str(source), str(tmp_path / "out")], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_a_disk_without_room_is_refused_before_the_work(
    source: Path, tmp_path: Path, capsys, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 1000, 1000))
    assert "only 1.0 KiB are free" in refused([str(source), str(tmp_path / "out")], capsys)
    assert not list(tmp_path.iterdir())


def test_what_is_packed_already_has_no_way_back(source: Path, tmp_path: Path, capsys):
    packed = tmp_path / "packed"
    large = build(fp8=Fp8(), sizes=Sizes(64, 64)).write(tmp_path / "large")
    convert(large, packed, Options(setting="8bit"))
    words = [str(packed), str(tmp_path / "out"), "--layout", "per-expert"]
    assert "keeps this checkpoint's" in refused(words, capsys, code=1)
    words = [str(packed), str(tmp_path / "out"), "--quantize", "4bit"]
    assert "quantised already" in refused(words, capsys, code=1)
    # As it is, it can be copied.
    convert(packed, tmp_path / "copy", Options())
    assert same_bits(read(tmp_path / "copy"), read(packed))


def test_an_empty_folder_is_taken_and_environment_and_hooks_stay_as_they_were(
    source: Path, tmp_path: Path, monkeypatch
):
    import vllm_moe_compat

    vllm_moe_compat.revert()
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "none")
    monkeypatch.delenv("VLLM_MOE_COMPAT_DTYPE", raising=False)
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", Options(setting="4bit"))
    assert os.environ["VLLM_MOE_COMPAT_QUANTIZE"] == "none"
    assert "VLLM_MOE_COMPAT_DTYPE" not in os.environ
    assert not vllm_moe_compat.status().hooks
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_link_that_leaves_the_checkpoint_is_not_copied(source: Path, tmp_path: Path, capsys):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "key.jinja").write_text("mine")
    linked = tmp_path / "linked"
    shutil.copytree(source, linked)
    templates = linked / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("tool")
    (templates / "key.jinja").symlink_to(elsewhere / "key.jinja")
    (linked / "tokenizer_config.json").write_text("{}")
    (linked / "alias.json").symlink_to("tokenizer_config.json")
    (linked / "special_tokens_map.json").symlink_to(secret)
    assert main(["convert", str(linked), str(tmp_path / "out")]) == 0
    notes = capsys.readouterr().err
    assert f"special_tokens_map.json is a link to {secret}, outside the checkpoint" in notes
    assert "key.jinja is a link to" in notes
    copied = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert "special_tokens_map.json" not in copied
    assert "additional_chat_templates/key.jinja" not in copied
    assert {"alias.json", "additional_chat_templates/tool.jinja"} <= copied
    shutil.rmtree(templates)
    templates.symlink_to(elsewhere)
    assert main(["convert", str(linked), str(tmp_path / "again")]) == 0
    assert "additional_chat_templates is a link to" in capsys.readouterr().err
    assert not (tmp_path / "again" / "additional_chat_templates").exists()


def test_links_of_the_hubs_cache_are_copied(source: Path, tmp_path: Path, capsys):
    cached = tmp_path / "models--org--name"
    snapshot, blobs = cached / "snapshots" / "abc", cached / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (blobs / "template").write_text("hello")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/template")
    assert main(["convert", str(snapshot), str(tmp_path / "out")]) == 0
    assert "is a link" not in capsys.readouterr().err
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "hello"


@pytest.mark.parametrize("form", [[], ["--layout", "combined"]], ids=["mlx", "published"])
def test_a_config_beyond_every_limit_is_refused_in_one_line(
    source: Path, tmp_path: Path, form: list[str], capsys
):
    odd = tmp_path / "odd"
    shutil.copytree(source, odd)
    config = odd / "config.json"
    text = config.read_text().rstrip()
    assert text.endswith("}")
    words = [str(odd), str(tmp_path / "out"), *form]
    for more, part in (
        ("[" * 200 + "]" * 200, "nested more than 100 levels"),
        ("[" * 100_000 + "]" * 100_000, "config.json"),
        (f'"{"x" * 2**24}"', "more than 16,777,216 bytes"),
    ):
        config.write_text(f'{text[:-1]}, "more": {more}}}')
        assert part in refused(words, capsys)
    config.unlink()
    os.mkfifo(config)
    assert "it is a pipe, not a regular file" in refused(words, capsys)
    assert not (tmp_path / "out").exists()
