"""Convert a checkpoint: check first, write into a partial folder, rename it at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_compat.commands.convert import folder as folders
from vllm_moe_compat.commands.convert.folder import Report
from vllm_moe_compat.commands.convert.source import Source
from vllm_moe_compat.envs import DTYPE, ENABLED, QUANTIZE
from vllm_moe_compat.errors import CheckpointFileError, SettingError
from vllm_moe_compat.load import patching
from vllm_moe_compat.load.progress import bar
from vllm_moe_compat.plan.estimate import nbytes
from vllm_moe_compat.rewrite.shards import Shards
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
        replace_partial: whether the partial folder of a killed conversion may be removed.
        verify: whether every tensor is read back and compared.
    """

    layout: WrittenLayout | None = None
    setting: str = "none"
    dtype: str = ""
    shard_bytes: int = MAX_SHARD_BYTES
    replace_partial: bool = False
    verify: bool = False


def convert(source: Path, target: Path, options: Options) -> Report:
    """Write the checkpoint in another layout.

    At most one projection of one layer's experts is in memory at a time.

    Args:
        source: the checkpoint's folder.
        target: a new or empty folder.
        options: the options of the conversion.

    Raises:
        CompatError: the checkpoint cannot be read, or cannot be written in that layout.
        SettingError: the target is not empty, lies inside the source, or the disk is full.
    """
    folders.check_source(source)
    folders.check_target(source, target)
    if ENABLED.read() == "0":
        raise SettingError(f"{ENABLED.name}=0 switches off the hooks that convert needs; unset it.")
    import mlx.core as mx

    began = time.perf_counter()
    with folders.complete_folder(target, replace=options.replace_partial) as work, _hooks(options):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        result = _source(source, options)
        if not result.specs:
            raise CheckpointFileError(f"{source}: it has no tensor that the model uses.")
        folders.check_space(target, sum(map(nbytes, result.specs.values())) + _OVERHEAD)
        try:
            result.save_config(work)
            result.notes += folders.copy_rest(source, work)
            shards = Shards(work, result.specs, options.shard_bytes, result.kind)
            result.check(work)
            with bar(len(result.specs), "Writing checkpoint tensors") as done:
                for name, array in result.stream():
                    shards.write(name, array)
                    del array
                    done(1)
            shards.finish()
            if options.verify:
                shards.verify()
        except OSError as error:
            raise SettingError(
                f"{target}: it could not be written ({error}); free space or name another folder."
            ) from error
        peak = mx.get_peak_memory() - before
    return Report(
        source=source,
        target=target,
        form=result.form,
        read=result.read,
        written=shards.total,
        tensors=len(result.specs),
        shards=shards.count,
        seconds=time.perf_counter() - began,
        peak=peak,
        notes=tuple(result.notes),
    )


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
