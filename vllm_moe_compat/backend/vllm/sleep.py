"""Sleep mode: a worker gives the memory of weights and pages back, and takes it again.

On unified memory a copy of the weights elsewhere would give nothing back, so the weights are
dropped, and read from the checkpoint again by the loader that read them first. The pages are
dropped too; vLLM has forgotten its cached prefixes by then, and preempted what was running, so
new pages of zeros are right.

Level 1 promises the same weights, so it compares sizes and times of the checkpoint's files.
Level 2 promises none: weights are then read when waking is complete, or by ``reload``, whichever
comes first. That way new weights in the same files are read once.

vLLM pauses, and aborts requests, before it calls the worker. ``permit`` is asked before that (see
``pausing``), and is the only way in: a call of the worker's ``sleep`` or
``discard`` that vLLM's engine does not make would leave the scheduler with prefixes that no page
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from vllm_moe_compat.backend.model.loader import ServedModel
from vllm_moe_compat.backend.vllm.runner import ModelRunner
from vllm_moe_compat.checkpoint import file_stamps
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.expert_cache import whole_model
from vllm_moe_compat.load.memory import device_memory, give_back
from vllm_moe_compat.log import logger

WEIGHTS, PAGES = "weights", "kv_cache"
TAGS = frozenset((WEIGHTS, PAGES))
"""What can sleep, by vLLM's names."""


class Sleeper(Protocol):
    """The parts of a worker that sleep."""

    served: ServedModel
    runner: ModelRunner


class SleepMode:
    """What of a worker's memory is held, and what vLLM wants to be held."""

    def __init__(
        self, worker: Sleeper, load: Callable[[Path], ServedModel], *, enabled: bool
    ) -> None:
        """Begin awake.

        Args:
            worker: its model and pages sleep; ``served`` is replaced.
            load: loads the checkpoint in a folder, as at start-up.
            enabled: ``--enable-sleep-mode``.
        """
        self._worker, self._load, self._enabled = worker, load, enabled
        self._held, self._wanted = set(TAGS), set(TAGS)
        self._same_weights = True
        self._permitted: frozenset[str] = frozenset()
        self._shapes = _shapes(worker.served)

    @property
    def asleep(self) -> list[str]:
        """Tags of the memory that is given back."""
        return sorted(TAGS - self._held)

    def permit(self, level: int) -> None:
        """Permit the ``sleep`` that follows; raises before vLLM has paused anything.

        Raises:
            UnsupportedServingError: sleep mode is not enabled, or there is no such level.
            CheckpointFileError: the weights of level 1 could not be read again.
        """
        if level not in (0, 1, 2):
            raise UnsupportedServingError(f"There is no sleep level {level}; use 0, 1 or 2.")
        if level == 0:
            return
        if not self._enabled:
            raise UnsupportedServingError(
                f"Sleep level {level} gives memory back only if the server was started with "
                "--enable-sleep-mode (LLM(enable_sleep_mode=True)); nothing was paused."
            )
        if level == 1 and WEIGHTS in self._held:
            file_stamps.check(
                self._worker.served.stamps,
                "level 1 has to read the same weights again: put the file back, or sleep at level "
                "2, which takes what the checkpoint holds then",
            )
        self._permitted = TAGS

    def permit_release(self) -> None:
        """Permit the ``release`` of the pages that follows."""
        self._permitted = frozenset((PAGES,))

    def revoke(self) -> None:
        """Take a permission back, since vLLM's engine did not come to use it."""
        self._permitted = frozenset()

    def refuse_resume(self) -> None:
        """Raise, before vLLM schedules again, if memory is missing.

        Raises:
            UnsupportedServingError: the worker sleeps.
        """
        if self.asleep:
            raise UnsupportedServingError(
                f"The server sleeps ({' and '.join(self.asleep)} given back), so it cannot resume; "
                "wake it up first."
            )

    def release(self, tags: Collection[str], level: int = 1) -> None:
        """Give the memory of ``tags`` back.

        Raises:
            UnsupportedServingError: vLLM's engine did not ask, see ``permit``.
        """
        if not set(tags) <= self._permitted:
            raise UnsupportedServingError(
                "A worker sleeps, or discards pages, only with vLLM's engine, which has to forget "
                "its cached prefixes; call LLM.sleep or LLM.release_kv_cache_memory, or POST "
                "/sleep or /release_kv_cache_memory."
            )
        self._permitted = frozenset()
        before = mx.get_active_memory()
        if not self._worker.runner.is_suspended:
            self._worker.runner.suspend()
        self._wanted -= set(tags)
        if PAGES in tags:
            self._worker.runner.storage.release()
            self._held.discard(PAGES)
        if WEIGHTS in tags:
            self._same_weights = level < 2
            self._drop_weights()
        give_back()
        logger.info(
            "asleep: %s given back, %.1f MiB; %.1f MiB are held",
            " and ".join(self.asleep),
            (before - mx.get_active_memory()) / 2**20,
            mx.get_active_memory() / 2**20,
        )

    def wake(self, tags: Collection[str] | None) -> None:
        """Take the memory of ``tags`` again, of all if None; awake parts stay as they are.

        Raises:
            CheckpointFileError: the files changed since level 1.
            CompatError: the checkpoint does not load, or not as the same model.
            UnsupportedServingError: memory is missing.
        """
        self._permitted = frozenset()
        wanted = self._wanted | (TAGS & set(TAGS if tags is None else tags))
        missing = wanted - self._held
        if WEIGHTS in missing and (self._same_weights or wanted == TAGS):
            stamps = self._worker.served.stamps
            if self._same_weights:
                file_stamps.check(
                    stamps,
                    "put the file back, or take the new weights with "
                    "collective_rpc('reload_weights') before waking up",
                )
            self._take_weights(stamps.folder)
        if PAGES in missing:
            self._allocate()
        self._wanted = wanted
        self._resume_if_complete()

    def reload(self, folder: Path | None = None) -> None:
        """Read the weights again, asleep or awake, from ``folder`` or where they came from.

        Awake, old and new weights are held at the same time, so that a checkpoint that does not
        load leaves the old ones in place. Asleep, nothing runs that would need the old ones.

        Raises:
            CompatError: the checkpoint does not load, or not as the same model.
        """
        folder = folder or self._worker.served.stamps.folder
        if self.asleep:
            self._drop_weights()
            # If this fails, waking up takes whatever the checkpoint holds then.
            self._same_weights = False
            self._take_weights(folder)
            self._resume_if_complete()
            return
        old, new = self._worker.served, self._checked(self._load(folder))
        self._worker.runner.suspend()
        self._worker.served = new
        _clear(old)
        give_back()
        self._worker.runner.resume(new.model, new.heads)
        if new.stamps != old.stamps:
            logger.warning(
                "new weights of %s; cached prefixes are those of the old ones until "
                "reset_prefix_cache is called",
                folder,
            )

    def _drop_weights(self) -> None:
        if WEIGHTS not in self._held:
            return
        self._held.discard(WEIGHTS)
        _clear(self._worker.served)
        self._worker.served = replace(self._worker.served, model=nn.Module(), heads=None)
        mx.clear_cache()

    def _take_weights(self, folder: Path) -> None:
        self._worker.served = self._checked(self._load(folder))
        self._held.add(WEIGHTS)

    def _checked(self, served: ServedModel) -> ServedModel:
        """Return ``served`` if it is the model that pages and requests were made for.

        Raises:
            UnsupportedServingError: layers or weights differ.
        """
        old, new = self._shapes, _shapes(served)
        differs = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        before = self._worker.served
        settings = (served.layers, served.max_length) == (before.layers, before.max_length)
        if differs or not settings:
            name = differs[0] if differs else "layers or length"
            raise UnsupportedServingError(
                f"{served.stamps.folder}: {name}: the served model has {old.get(name, 'others')}, "
                f"and this checkpoint {new.get(name, 'others')}; only weights can change while a "
                "server runs: start another one."
            )
        return served

    def _allocate(self) -> None:
        """Make the pages again.

        Raises:
            UnsupportedServingError: they are larger than the free memory.
        """
        storage = self._worker.runner.storage
        need = sum(pool.full_bytes for pool in storage.all_pools)
        _, free = device_memory()
        if need > free:
            raise UnsupportedServingError(
                f"The pages take {need / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free; free "
                "memory, and wake up again."
            )
        storage.allocate()
        self._held.add(PAGES)

    def _resume_if_complete(self) -> None:
        if self._held == TAGS and self._worker.runner.is_suspended:
            self._worker.runner.resume(self._worker.served.model, self._worker.served.heads)
            logger.info("awake: %.1f MiB are held", mx.get_active_memory() / 2**20)


def _shapes(served: ServedModel) -> dict[str, str]:
    """Return shape and dtype of every weight by its name, in words."""
    model, heads = served.model, served.heads
    found = {name: (array.shape, array.dtype) for name, array in tree_flatten(model.parameters())}
    found |= whole_model.parameters(model)
    for name, array in tree_flatten(heads.parameters()) if heads is not None else ():
        found[f"prediction head, {name}"] = array.shape, array.dtype
    return {
        name: f"{list(shape)} {str(dtype).rpartition('.')[2]}"
        for name, (shape, dtype) in found.items()
    }


def _clear(served: ServedModel) -> None:
    """Take all arrays out of the model and its heads, since others may hold the modules."""
    whole_model.close(served.model)
    for part in (served.model, served.heads):
        if part is not None:
            for module in [module for _, module in part.named_modules()]:
                module.clear()
