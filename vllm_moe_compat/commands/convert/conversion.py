"""Convert a checkpoint: check first, write into a partial folder, verify, rename it at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_compat.checkpoint.config_file import CONFIG
from vllm_moe_compat.checkpoint.index import INDEX
from vllm_moe_compat.commands.convert import folder as folders
from vllm_moe_compat.commands.convert.folder import Report
from vllm_moe_compat.commands.convert.partial import Partial, counted, partial_folder
from vllm_moe_compat.commands.convert.source import Source
from vllm_moe_compat.commands.convert.state import changed, files_of, state_of
from vllm_moe_compat.envs import DTYPE, ENABLED, QUANTIZE
from vllm_moe_compat.errors import CheckpointFileError, InsufficientMemoryError, SettingError
from vllm_moe_compat.load import patching
from vllm_moe_compat.load.progress import bar
from vllm_moe_compat.plan.estimate import nbytes
from vllm_moe_compat.rewrite.shards import DamagedShardError, Shards
from vllm_moe_compat.rewrite.written_layout import WrittenLayout

MAX_SHARD_BYTES = 5 * 10**9
_OVERHEAD = 16 * 2**20
"""A generous bound for headers, index and tokenizer."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a conversion.

    Attributes:
        layout: a published layout; None for MLX's own.
        setting: quantisation of the MLX form: ``none``, ``8bit``, …
        dtype: what FP8 becomes, and in MLX form every other float; empty for bfloat16,
            with what is no FP8 left as it is.
        shard_bytes: limit of a shard; a larger tensor gets a shard of its own.
        replace_partial: whether what an interrupted conversion left is removed first.
        verify: whether every tensor is read back from the disk and compared, before the target
            appears.
    """

    layout: WrittenLayout | None = None
    setting: str = "none"
    dtype: str = ""
    shard_bytes: int = MAX_SHARD_BYTES
    replace_partial: bool = False
    verify: bool = True


def convert(source: Path, target: Path, options: Options) -> Report:
    """Write the checkpoint in another layout.

    At most one projection of one layer's experts is in memory at a time. What an interrupted
    conversion of the same checkpoint with the same options finished is kept.

    Args:
        source: the checkpoint's folder.
        target: a new or empty folder.
        options: the options of the conversion.

    Raises:
        CompatError: the checkpoint cannot be read, or cannot be written in that layout.
        SettingError: the target is not empty, lies inside the source, or the disk is full, or
            another conversion to it is running.
        DamagedShardError: a tensor was read back with other bytes than were written.
    """
    folders.check_source(source)
    folders.check_target(source, target)
    if ENABLED.read() == "0":
        raise SettingError(f"{ENABLED.name}=0 switches off the hooks that convert needs; unset it.")
    try:
        with (
            partial_folder(target, replace=options.replace_partial) as partial,
            _hooks(options),
        ):
            # Another conversion may have filled it before this one got the lock.
            folders.check_target(source, target)
            return _convert(source, target, options, partial)
    except OSError as error:
        remedy = "; ".join(("free space or name another folder", *_notes(error)))
        raise SettingError(f"{target}: it could not be written ({error}); {remedy}.") from error
    except (DamagedShardError, InsufficientMemoryError) as error:
        if notes := _notes(error):
            error.args = (f"{str(error).rstrip('.')}; {notes[0]}.",)
        raise


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _convert(source: Path, target: Path, options: Options, partial: Partial) -> Report:
    import mlx.core as mx

    began = time.perf_counter()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = _source(source, options)
    if not result.specs:
        raise CheckpointFileError(f"{source}: it has no tensor that the model uses.")
    state = state_of(source, _settings(options), result.specs, result.form)
    partial.begin(state)
    kept = {name for sums in state.shards.values() for name in sums}
    if kept:
        result.notes.append(
            f"an interrupted run had finished {counted(len(state.shards), 'shard')}"
        )
    needed = sum(nbytes(spec) for name, spec in result.specs.items() if name not in kept)
    folders.check_space(target, needed + _OVERHEAD)
    result.save_config(partial.work)
    result.notes += folders.copy_rest(source, partial.work)
    shards = Shards(
        partial.work,
        result.specs,
        options.shard_bytes,
        result.kind,
        state.shards,
        partial.finished,
    )
    result.check(partial.work)
    partial.set_aside((CONFIG, INDEX))
    with bar(len(result.specs), "Writing checkpoint tensors") as done:
        written = shards.written
        done(len(written))
        for name, array in result.stream(written):
            shards.write(name, array)
            del array
            done(1)
    shards.finish()
    if options.verify:
        with bar(len(result.specs), "Verifying checkpoint tensors") as done:
            shards.verify(done)
    if (file := changed(state.source, files_of(source))) is not None:
        raise CheckpointFileError(
            f"{source}: {file} has changed while it was being converted, where the same file was "
            "expected throughout; convert it again."
        )
    partial.put_back((CONFIG, INDEX))
    partial.publish()
    return Report(
        source=source,
        target=target,
        form=result.form,
        read=result.read,
        written=shards.total,
        tensors=len(result.specs),
        shards=shards.count,
        seconds=time.perf_counter() - began,
        peak=mx.get_peak_memory() - before,
        notes=tuple(result.notes),
    )


def _settings(options: Options) -> dict[str, str | int]:
    """Return the options that determine the written bytes: name → value."""
    return {
        "--layout and --fp8": str(options.layout),
        "--quantize": options.setting,
        "--dtype": options.dtype,
        "--max-shard-size": options.shard_bytes,
    }


def _source(source: Path, options: Options) -> Source:
    if options.layout is None:
        from vllm_moe_compat.commands.convert import to_mlx

        return to_mlx.mlx_source(source, options.setting, options.dtype)
    from vllm_moe_compat.commands.convert import to_published

    return to_published.published_source(source, options.layout, options.dtype or "bfloat16")


@contextmanager
def _hooks(options: Options) -> Iterator[None]:
    """Install the hooks and set the dtype and the quantisation of loads by the options."""
    values = {QUANTIZE.name: options.setting, DTYPE.name: options.dtype or "bfloat16"}
    with _environment(values), patching.applied():
        yield


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
