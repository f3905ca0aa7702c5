"""What vLLM, and ``collective_rpc``, may ask of the worker outside of a step.

Each call works, does nothing where that is the right answer, or is refused in one sentence that
leaves everything as it was. ``tests/serve/test_worker_calls.py`` compares this with the methods of
vLLM's own workers, so that a release with a new one is noticed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from vllm.v1.worker.worker_base import WorkerBase

from vllm_moe_compat.backend.model.loader import ServedModel
from vllm_moe_compat.backend.vllm.runner import ModelRunner
from vllm_moe_compat.backend.vllm.sleep import WEIGHTS, SleepMode
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.expert_cache import whole_model
from vllm_moe_compat.expert_cache.install import containers

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W", bound="OutOfStepCalls")

LORA = "LoRA adapters; merge them into the checkpoint"
TRANSFER = (
    "weights that a trainer sends; write a checkpoint, and call "
    "collective_rpc('reload_weights', kwargs={'weights_path': FOLDER})"
)
SAVE = "writing its weights; vllm-moe-compat convert writes checkpoints"
ONE_DEVICE = "scaling: it has one device"
SNAPSHOT = "snapshots of its process"


def _refuse(what: str) -> NoReturn:
    raise UnsupportedServingError(f"The embedded MLX backend does not support {what}.")


def at_start_up(method: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[W, P], R]:
    """Refuse a step of the start-up once requests are served: it would change their pages."""

    @functools.wraps(method)
    def checked(self: W, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if "sleep_mode" in vars(self):
            raise UnsupportedServingError(
                f"{method.__name__} is a step of the start-up, which is over; start another server."
            )
        return method(self, *args, **kwargs)

    return checked


class OutOfStepCalls(WorkerBase):
    """Calls outside of a step; ``MlxWorker`` adds the start-up and the steps."""

    served: ServedModel
    runner: ModelRunner
    sleep_mode: SleepMode

    # --- sleep and weights ----------------------------------------------------

    def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and pages back, after ``sleep_mode.permit``."""
        self.sleep_mode.release(("weights", "kv_cache"), level)

    def discard(self, tags: tuple[str, ...]) -> None:
        """Give the memory of ``tags`` back, after ``sleep_mode.permit_release``."""
        self.sleep_mode.release(tags)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory of ``tags``, or all, again; what is awake stays as it is."""
        self.sleep_mode.wake(tags)

    def reload_weights(
        self,
        weights_iterator: Any = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Read the weights again, from ``weights_path`` or from where they came.

        Raises:
            CompatError: they do not load, or are not of the same model.
        """
        if weights_iterator is not None or not is_checkpoint_format:
            _refuse(TRANSFER)
        self.sleep_mode.reload(Path(weights_path) if weights_path is not None else None)

    def compute_weight_checksums(self) -> dict[str, str]:
        """Return the SHA-256 of every weight's bytes by its name.

        Raises:
            CompatError: the weights sleep, or an expert on disk cannot be read.
        """
        found = {
            name: hashlib.sha256(np.array(array.reshape(-1).view(mx.uint8)).data)
            for name, array in tree_flatten(self.get_model().parameters())
        }
        for container in containers(self.get_model()):
            for expert in whole_model.experts(container):
                for name, data in expert.items():
                    path = f"{container.layer}.{name}"
                    found.setdefault(path, hashlib.sha256()).update(data.data)
        return {name: digest.hexdigest() for name, digest in found.items()}

    def get_model(self) -> Any:
        """Return the mlx-lm model.

        Raises:
            UnsupportedServingError: its weights sleep.
        """
        if "sleep_mode" in vars(self) and WEIGHTS in self.sleep_mode.asleep:
            raise UnsupportedServingError("The model's weights sleep; wake the server up first.")
        return self.served.model

    def get_model_inspection(self) -> str:
        """Return the model's modules as text."""
        model: nn.Module = self.get_model()
        return str(model)

    def update_config(self, overrides: dict[str, Any]) -> None:
        """Refuse: the settings have been used."""
        _refuse(f"changing {', '.join(overrides)} while it serves; start another server with it")

    def reset_weights(self) -> None:
        """Refuse to serve zeros."""
        _refuse("weights of zeros")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Refuse."""
        _refuse(TRANSFER)

    def shutdown_weight_transfer_engine(self) -> None:
        """Do nothing: there is none."""

    def start_weight_update(self) -> None:
        """Refuse."""
        _refuse(TRANSFER)

    def start_draft_weight_update(self) -> None:
        """Refuse."""
        _refuse(TRANSFER)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Refuse."""
        _refuse(TRANSFER)

    def finish_weight_update(self) -> None:
        """Refuse."""
        _refuse(TRANSFER)

    def save_sharded_state(
        self, path: str, pattern: str | None = None, max_size: int | None = None
    ) -> None:
        """Refuse."""
        _refuse(SAVE)

    def save_tensorized_model(self, tensorizer_config: Any) -> None:
        """Refuse."""
        _refuse(SAVE)

    # --- caches, health, tasks ------------------------------------------------

    def reset_encoder_cache(self) -> None:
        """Do nothing: there is no encoder."""

    def synchronize_device(self) -> None:
        """Wait for the running pass, if there is one."""
        mx.synchronize()

    def get_supported_tasks(self) -> tuple[str, ...]:
        """Return text generation."""
        return ("generate",)

    def get_draft_model(self) -> None:
        """Return None: there is no speculative decoding."""

    def get_cache_block_size_bytes(self) -> int:
        """Return the bytes of one block in all layers."""
        pools = self.runner.storage.all_pools
        return sum(pool.full_bytes // pool.num_blocks for pool in pools)

    def get_kv_connector_handshake_metadata(self) -> None:
        """Return None: there is no KV connector."""

    def get_compilation_match_table(self) -> dict[str, int]:
        """Return nothing: torch compiles nothing."""
        return {}

    def get_encoder_timing_stats(self) -> dict[str, dict[str, float | int]]:
        """Return nothing: there is no encoder."""
        return {}

    def execute_dummy_batch(self) -> None:
        """Do nothing: there is no other device to keep in step."""

    def profile(
        self, is_start: bool = True, profile_prefix: str | None = None, **limits: Any
    ) -> None:
        """Refuse: there is no torch profile of MLX."""
        _refuse("profiles of torch, which sees nothing of MLX; sample the process instead")

    # --- LoRA, scaling, snapshots ---------------------------------------------

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Refuse."""
        _refuse(LORA)

    def remove_lora(self, lora_id: int) -> bool:
        """Return False: there is no such adapter."""
        return False

    def pin_lora(self, lora_id: int) -> bool:
        """Refuse."""
        _refuse(LORA)

    def list_loras(self) -> set[int]:
        """Return no adapters."""
        return set()

    def elastic_ep_execute(self, execute_method: str, *args: Any, **kwargs: Any) -> Any:
        """Refuse."""
        _refuse(ONE_DEVICE)

    def handle_ft_command(self, ft_request: Any) -> Any:
        """Refuse."""
        _refuse(ONE_DEVICE)

    def checkpoint_prepare(self) -> None:
        """Refuse."""
        _refuse(SNAPSHOT)

    def checkpoint_restore(self) -> None:
        """Refuse."""
        _refuse(SNAPSHOT)
