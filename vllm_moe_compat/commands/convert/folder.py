"""The folder that a conversion writes: there as a whole, or not at all.

The work is done in a folder beside it, ``.NAME.partial``, which is renamed at the end.
Nothing that is there already is ever written over. An interrupted conversion takes its
partial folder away; one that was killed leaves it, and the next one says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_compat.checkpoint.config_file import CONFIG, read_config
from vllm_moe_compat.checkpoint.headers import weight_files
from vllm_moe_compat.checkpoint.index import INDEX
from vllm_moe_compat.checkpoint.links import outside_target
from vllm_moe_compat.errors import CheckpointFileError, SettingError
from vllm_moe_compat.load.report import size
from vllm_moe_compat.rewrite.shards import sync

# Of another format, or about how the source was quantised.
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
    """What a conversion did.

    Attributes:
        source: the folder that was read.
        target: the folder that was written.
        form: what it holds now, in words.
        read: bytes of the tensors that were read.
        written: bytes of the tensors that were written.
        tensors: how many.
        shards: how many.
        seconds: how long it took.
        peak: the most that MLX held meanwhile, in bytes.
        notes: what whoever uses the result should know.
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
    """See that there is a checkpoint.

    Raises:
        CheckpointFileError: there is none.
    """
    if not source.is_dir():
        raise CheckpointFileError(
            f"{source}: no such folder, where a checkpoint was expected; download the model first, "
            "for instance with `hf download`, and name its folder."
        )
    if not os.path.lexists(source / CONFIG):
        raise CheckpointFileError(
            f"{source}: no config.json was found, where a checkpoint was expected; name the folder "
            "that holds it."
        )
    read_config(source)
    if not weight_files(source):
        raise CheckpointFileError(
            f"{source}: no model*.safetensors was found, where a checkpoint was expected; weights "
            "of other formats cannot be converted."
        )


def check_target(source: Path, target: Path) -> None:
    """See that the target is free and outside of the source.

    Raises:
        SettingError: it is not.
    """
    here, there = source.resolve(), target.resolve()
    if there == here or here in there.parents:
        raise SettingError(
            f"{target} lies in {source}, which is being read, where another folder was expected; "
            "name one beside it."
        )
    if there.exists() and (not there.is_dir() or any(there.iterdir())):
        raise SettingError(
            f"{target} exists already, where a new or empty folder was expected, and nothing is "
            "written over; name another, or remove that one."
        )


def partial_of(target: Path) -> Path:
    """Return the folder that is worked in."""
    there = target.resolve()
    return there.with_name(f".{there.name}.partial")


def check_space(target: Path, needed: int) -> None:
    """See that there is room for the result.

    Raises:
        SettingError: there is not.
    """
    free = shutil.disk_usage(partial_of(target).parent).free
    if needed > free:
        raise SettingError(
            f"{target}: {size(needed)} will be written, where only {size(free)} are free; make "
            "room, name a folder on another disk, or choose a smaller format."
        )


@contextmanager
def whole(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a folder to write into; at the end it bears the target's name.

    Args:
        target: the folder that will be there.
        replace: whether what a killed conversion left may be removed.

    Raises:
        SettingError: such a thing is there and may not be removed.
        OSError: the disk's.
    """
    there, work = target.resolve(), partial_of(target)
    work.parent.mkdir(parents=True, exist_ok=True)
    if replace:
        shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
    except FileExistsError as error:
        raise SettingError(
            f"{work} is there, which a conversion that was killed has left, or one that is still "
            "running works in; see that none is running and add --replace-partial to start over."
        ) from error
    try:
        yield work
        sync(work)
        # Onto an empty folder or none; where one has been filled since, this fails.
        os.rename(work, there)
        sync(there.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


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
