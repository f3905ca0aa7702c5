"""vLLM's multiprocessing executor, for engines of several ranks.

vLLM starts, feeds and watches the ranks. Added is what an engine that is not in the worker's
process would miss:

- settings that the worker changes while it starts (the length of sequences, their number, the
  block size) are taken over into the engine's configuration, if all ranks changed them alike;
- a call of all workers that fails on some ranks leaves no answers behind, which vLLM would take
  for those of the next call;
- the engine's process ends with its front end, and no rank outlives the engine.

This module is imported in the engine's process, which forks the ranks, so it never imports mlx.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cloudpickle
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_moe_compat.backend.vllm import bridge
from vllm_moe_compat.backend.vllm.engine_process import EngineProcess
from vllm_moe_compat.backend.vllm.pausing import ask_worker_first
from vllm_moe_compat.errors import UnsupportedServingError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

LAST_WAIT = 5.0
"""Seconds for a rank to end, after vLLM has asked it to."""

# Section and name of the settings that a worker may change while it starts.
SETTLED = (
    ("model_config", "max_model_len"),
    ("scheduler_config", "max_num_seqs"),
    ("cache_config", "block_size"),
    ("cache_config", "mamba_block_size"),
    ("cache_config", "mamba_page_size_padded"),
)


def settled(vllm_config: VllmConfig) -> dict[str, Any]:
    """Return the settings that a worker may change, by ``section.name``."""
    return {
        f"{section}.{name}": getattr(getattr(vllm_config, section), name)
        for section, name in SETTLED
    }


class MlxExecutor(MultiprocExecutor):
    """Runs the ranks of one engine."""

    def _init_executor(self) -> None:
        bridge.allow_shutdown_without_accelerator()
        bridge.accept_own_scheduler()
        ask_worker_first()
        self._process = EngineProcess()
        self._process.starting()
        super()._init_executor()
        try:
            self._take_over_settings()
        except Exception:
            self.shutdown()
            raise

    def determine_available_memory(self) -> list[int]:
        """Return the bytes for pages of each rank."""
        found: list[int] = super().determine_available_memory()
        self._take_over_settings()
        return found

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Have the ranks allocate their pages."""
        super().initialize_from_config(kv_cache_configs)
        self._take_over_settings()

    def compile_or_warm_up_model(self) -> None:
        """Have the ranks check themselves; the start is over afterwards."""
        super().compile_or_warm_up_model()
        self._process.started()

    def _take_over_settings(self) -> None:
        """Make the settings that the workers changed those of the engine.

        Raises:
            UnsupportedServingError: the ranks differ.
        """
        first, *others = self.collective_rpc("settled_settings")
        for rank, found in enumerate(others, 1):
            for setting, value in found.items():
                if value != first[setting]:
                    raise UnsupportedServingError(
                        f"The ranks settled on different values of {setting}: rank 0 on "
                        f"{first[setting]}, rank {rank} on {value}; set it."
                    )
        for setting, value in first.items():
            section, name = setting.split(".")
            setattr(getattr(self.vllm_config, section), name, value)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        **aggregators: Any,
    ) -> Any:
        """Call ``method`` of all workers; see vLLM.

        Raises:
            RuntimeError: it failed on a rank.
        """
        if unique_reply_rank is not None or non_block or any(aggregators.values()):
            return super().collective_rpc(
                method, timeout, args, kwargs, non_block, unique_reply_rank, **aggregators
            )
        call = method if isinstance(method, str) else cloudpickle.dumps(method)
        answers = super().collective_rpc(_answer, timeout, (call, args, kwargs or {}))
        for rank, (_, error) in enumerate(answers):
            if error is not None:
                raise RuntimeError(f"rank {rank}: {error}")
        return [value for value, _ in answers]

    def shutdown(self) -> None:
        """End the ranks; a rank that does not listen is killed."""
        ranks = [handle.proc for handle in getattr(self, "workers", None) or ()]
        super().shutdown()
        # vLLM returns at once if another thread is about to end them, and that thread ends with
        # this process.
        for rank in ranks:
            rank.join(LAST_WAIT)
            if rank.is_alive():
                rank.kill()


def _answer(
    worker: Any, call: str | bytes, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, str | None]:
    """Call a worker; return its answer, or its error as a sentence."""
    try:
        if isinstance(call, str):
            return getattr(worker, call)(*args, **kwargs), None
        return pickle.loads(call)(worker, *args, **kwargs), None
    except Exception as error:  # noqa: BLE001 - it is told to the caller
        return None, f"{type(error).__name__}: {error}"
