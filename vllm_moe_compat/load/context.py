"""State carried from the ``load_config`` hook to the ``sanitize`` hook.

``load_config`` receives the checkpoint's folder and returns its config; ``sanitize`` receives
neither. The first hook therefore plans the load and stores the plan in a context variable,
with a description of every tensor. By these descriptions the second hook verifies that it
received the tensors of that checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint import file_stamps
from vllm_moe_compat.checkpoint.file_stamps import FileStamps
from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load import caller
from vllm_moe_compat.load.caller import Caller
from vllm_moe_compat.load.options import load_options
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.planner import Plan

_BYTES = ("U8", "F8_E4M3", "F8_E5M2", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class LoadContext:
    """A load between its two hooks.

    Attributes:
        model_dir: the checkpoint's folder.
        planned: the planned load.
        row: row of the class that is loaded.
        plan: the plan.
        config: the dict that ``load_config`` returned and ``load_model`` uses.
        stamps: what the files were when their headers were read.
        caller: the call of mlx-lm's that reads the config.
    """

    model_dir: Path
    planned: PlannedLoad
    row: Row
    plan: Plan
    config: dict[str, Any]
    stamps: FileStamps
    caller: Caller

    def check_files(self) -> None:
        """Check that no file has changed since the headers were read.

        Raises:
            CheckpointFileError: a file was truncated, overwritten, replaced, added or removed.
        """
        file_stamps.check(
            self.stamps,
            "something is writing to the checkpoint, so load it again when that has ended",
        )

    def matches(self, given: Mapping[str, TensorInfo]) -> bool:
        """Whether ``given``, as described by MLX, are this checkpoint's tensors.

        MLX reports FP8 as ``U8``, so the comparison only distinguishes bytes from other dtypes.
        """
        tensors = self.planned.headers.tensors
        if tensors.keys() != given.keys():
            return False
        return all(
            given[name].shape == tensors[name].shape
            and (given[name].dtype == "U8") == (tensors[name].dtype in _BYTES)
            for build in self.plan.builds
            for name in build.sources
        )

    @property
    def lazy(self) -> bool:
        """Whether the caller decides what is read, and when."""
        options = load_options()
        return self.caller.lazy and not options.at_once and options.executor is None

    def is_running(self) -> bool:
        """Whether the call of ``load_model`` that began this load is still running."""
        utils = sys.modules.get("mlx_lm.utils")
        found = caller.find(utils).call if utils is not None else 0
        return found != 0 and found == self.caller.call

    def changed(self, given: Mapping[str, TensorInfo]) -> list[str]:
        """Return the sources of builds that ``given`` has in another shape, or as other numbers."""
        tensors = self.planned.headers.tensors
        return [
            name
            for build in self.plan.builds
            for name in build.sources
            if name in given
            and (
                given[name].shape != tensors[name].shape
                or (given[name].dtype == "U8") != (tensors[name].dtype in _BYTES)
            )
        ]


current: ContextVar[LoadContext | None] = ContextVar("vllm_moe_compat_load", default=None)
