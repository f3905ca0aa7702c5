"""The folders of a conversion: what is checked before, and what is copied beside the weights.

Existing files are never overwritten: the target is new or empty.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_compat.checkpoint.config_file import CONFIG, read_config
from vllm_moe_compat.checkpoint.headers import weight_files
from vllm_moe_compat.checkpoint.index import INDEX
from vllm_moe_compat.checkpoint.links import outside_target
from vllm_moe_compat.errors import CheckpointFileError, SettingError
from vllm_moe_compat.load.report import size

# Weights of other formats, and files that describe the source's weights.
_WEIGHTS: tuple[str, ...] = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".npz",
)
_WEIGHTS += (".onnx", ".onnx_data", ".ckpt", ".index.json", ".tflite", ".mlmodel")
_DESCRIBED = (CONFIG, "hf_quant_config.json", "quantize_config.json", "README.md", INDEX)
_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True, slots=True)
class Report:
    """The report of a conversion.

    Attributes:
        source: the folder that was read.
        target: the folder that was written.
        form: its form in words.
        read: size in bytes of the source's tensors.
        written: size in bytes of the written tensors.
        tensors: number of written tensors.
        shards: number of shards.
        seconds: duration.
        peak: peak of MLX's memory in bytes.
        notes: remarks for the user of the result.
    """

    source: Path
    target: Path
    form: str
    read: int
    written: int
    tensors: int
    shards: int
    seconds: float
    peak: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shards = f"{self.shards} shard{'s' if self.shards > 1 else ''}"
        return (
            f"{self.target}: {self.form}; read {size(self.read)}, wrote {size(self.written)} in "
            f"{self.tensors:,} tensors and {shards}, {self.seconds:.1f} s, peak {size(self.peak)}"
        )


def check_source(source: Path) -> None:
    """Check that the source is a checkpoint with a readable config.

    Raises:
        CheckpointFileError: it is not.
    """
    if not source.is_dir():
        raise CheckpointFileError(
            f"{source}: no such folder, where a checkpoint was expected; download the model first, "
            "for instance with `hf download`, and name its folder."
        )
    if not os.path.lexists(source / CONFIG):
        raise CheckpointFileError(
            f"{source}: no config.json was found, where a checkpoint was expected; download the "
            "model again, or name the folder that holds it."
        )
    read_config(source)
    if not weight_files(source):
        raise CheckpointFileError(
            f"{source}: no model*.safetensors was found, where a checkpoint was expected; download "
            "the model again; weights of other formats cannot be converted."
        )


def check_target(source: Path, target: Path) -> None:
    """Check that the target is new or empty, and outside the source.

    Raises:
        SettingError: it is not.
    """
    here, there = source.resolve(), target.resolve()
    if there == here or here in there.parents:
        raise SettingError(
            f"{target} lies in the source, {source}, where a folder outside it was expected; name "
            "another one."
        )
    if there.exists() and (not there.is_dir() or any(there.iterdir())):
        raise SettingError(
            f"{target} exists already, where a new or empty folder was expected; name another one, "
            "or remove it."
        )


def check_space(target: Path, needed: int) -> None:
    """Check that the disk has room for ``needed`` bytes.

    Raises:
        SettingError: it has not.
    """
    free = shutil.disk_usage(target.resolve().parent).free
    if needed > free:
        raise SettingError(
            f"{target}: {size(needed)} will be written, where only {size(free)} are free; free "
            "space, name a folder on another disk, or choose a smaller format."
        )


def copy_rest(source: Path, work: Path) -> list[str]:
    """Copy the tokenizer, the chat templates and other files that are not about weights.

    A link that leaves the checkpoint is not followed: the result is often uploaded, and the
    target may be anything on this machine.

    Returns:
        A note for each link that was left out.
    """
    notes = []
    for path in _rest(source):
        name = path.relative_to(source)
        if (target := outside_target(path, source)) is not None:
            notes.append(
                f"{name} is a link to {target}, outside the checkpoint, and is not copied; copy it "
                "yourself if it belongs to the model"
            )
        elif path.is_file():
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, work / name)
    return notes


def _rest(source: Path) -> Iterator[Path]:
    """Yield the files to copy; of the subfolders, those that transformers reads."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in _DESCRIBED or path.name.endswith(_WEIGHTS):
            continue
        if path.is_dir() and path.name in _FOLDERS:
            # A linked folder is left out as a whole.
            linked = outside_target(path, source) is not None
            yield from [path] if linked else sorted(path.rglob("*"))
        elif not path.is_dir():
            yield path
