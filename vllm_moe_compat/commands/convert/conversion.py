"""From a folder to a folder: checks first, then the work, then the name."""

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
from vllm_moe_compat.rewrite.written_layout import Form

MAX_SHARD_BYTES = 5 * 10**9
_OVERHEAD = 16 * 2**20
"""Headers, index, tokenizer and the like; generously."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to write.

    Attributes:
        form: a published form; None for MLX's own.
        setting: to what the MLX form is quantised; ``none``, ``8bit``, …
        dtype: what FP8 becomes, and in MLX form every other float; empty for bfloat16,
            with what is no FP8 left as it is.
        shard_bytes: of a file, at most, but for a tensor that is larger.
        replace_partial: whether the leavings of a killed conversion may be removed.
        verify: whether every byte is read back and compared.
    """

    form: Form | None = None
    setting: str = "none"
    dtype: str = ""
    shard_bytes: int = MAX_SHARD_BYTES
    replace_partial: bool = False
    verify: bool = False


def convert(source: Path, target: Path, options: Options) -> Report:
    """Write the checkpoint in another layout.

    No more is in memory than what is made at once: a projection of one layer's experts.

    Args:
        source: the checkpoint's folder.
        target: a folder that is not there, or is empty.
        options: what to write.

    Raises:
        CompatError: the checkpoint cannot be read, or not be written so.
        SettingError: the target is taken, inside the source or on a full disk.
    """
    folders.check_source(source)
    folders.check_target(source, target)
    if ENABLED.read() == "0":
        raise SettingError(
            f"{ENABLED.name}=0 switches off what reads the checkpoint; unset it to convert."
        )
    import mlx.core as mx

    began = time.perf_counter()
    with folders.whole(target, replace=options.replace_partial) as work, _hooks(options):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        given = _prepare(source, options)
        if not given.specs:
            raise CheckpointFileError(f"{source}: holds no tensor that the model uses.")
        folders.check_space(target, sum(map(nbytes, given.specs.values())) + _OVERHEAD)
        try:
            given.save_config(work)
            given.notes += folders.copy_rest(source, work)
            shards = Shards(work, given.specs, options.shard_bytes, given.kind)
            given.check(work)
            with bar(len(given.specs), "Writing checkpoint tensors") as done:
                for name, array in given.stream():
                    shards.write(name, array)
                    del array
                    done(1)
            shards.finish()
            if options.verify:
                shards.verify()
        except OSError as error:
            raise SettingError(
                f"{target}: it could not be written ({error}); make room or name another folder."
            ) from error
        peak = mx.get_peak_memory() - before
    return Report(
        source=source,
        target=target,
        form=given.form,
        read=given.read,
        written=shards.total,
        tensors=len(given.specs),
        shards=shards.count,
        seconds=time.perf_counter() - began,
        peak=peak,
        notes=tuple(given.notes),
    )


def _prepare(source: Path, options: Options) -> Source:
    if options.form is None:
        from vllm_moe_compat.commands.convert import to_mlx

        return to_mlx.prepare(source, options.setting, options.dtype)
    from vllm_moe_compat.commands.convert import to_published

    return to_published.prepare(source, options.form, options.dtype or "bfloat16")


@contextmanager
def _hooks(options: Options) -> Iterator[None]:
    """Have the hooks in, and loads give what the options say, whatever the device is."""
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
