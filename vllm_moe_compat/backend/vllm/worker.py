"""vLLM's worker over MLX: one process, one device, one model.

In: vLLM's calls in their order (load, describe the cache, report memory, take
the cache plan, warm up, execute steps). Out: a model that serves. Everything
about a step is the runner's; this file is about memory and life cycle.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import psutil
import torch
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from vllm_moe_compat.backend.model import loader as handoff
from vllm_moe_compat.backend.model.layers import AttentionLayer
from vllm_moe_compat.backend.pages.page_pool import PagePool
from vllm_moe_compat.backend.step import self_check
from vllm_moe_compat.backend.vllm import bridge as vllm_bridge
from vllm_moe_compat.backend.vllm import kv_specs
from vllm_moe_compat.backend.vllm.budget import Budget, measure
from vllm_moe_compat.backend.vllm.kv_specs import MLX_DTYPES
from vllm_moe_compat.backend.vllm.runner import Memory, ModelRunner, StepOutput
from vllm_moe_compat.backend.vllm.sampling import TokenSampler
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.load import progress
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import ModelRunnerOutput


def _layer_name(index: int) -> str:
    return f"layers.{index}"


class MlxWorker(WorkerBase):
    """The worker class that ``MlxPlatform`` names."""

    served: handoff.ServedModel
    budget: Budget
    runner: ModelRunner

    def init_device(self) -> None:
        """Fix the seeds; MLX finds its device by itself."""
        vllm_bridge.allow_shutdown_without_accelerator()
        self.device = torch.device("cpu")
        torch.manual_seed(self.model_config.seed)
        mx.random.seed(self.model_config.seed)
        mx.reset_peak_memory()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the checkpoint and align page sizes of its layer kinds.

        Raises:
            CompatError: the checkpoint or the model cannot be served.
        """
        dtype = MLX_DTYPES[self.model_config.dtype]
        with progress.wanted_as(self.load_config.use_tqdm_on_load):
            self.served = handoff.load(self.model_config.model, self.model_config.revision, dtype)
        kv_specs.align_pages(self.vllm_config, self.served.layers)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """What each layer keeps, in vLLM's terms."""
        found = kv_specs.specs(self.vllm_config, self.served.layers)
        return {_layer_name(index): spec for index, spec in found.items()}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Layer outermost: every layer's pages are one array."""
        return ["LBNHC"]

    def determine_available_memory(self) -> int:
        """Bytes for pages, after weights, activations and resident states.

        Raises:
            UnsupportedServingError: nothing is left.
        """
        self.budget = measure(self.vllm_config, self.served)
        return self.budget.page_bytes

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the pages that vLLM planned, and build the runner.

        Raises:
            UnsupportedServingError: a sequence of the length asked for does not fit.
        """
        vllm_bridge.leave_room_for_the_null_block(self.vllm_config, kv_cache_config)
        groups: dict[int, int] = {}
        page_bytes: dict[int, int] = {}
        sizes = []
        for number, group in enumerate(kv_cache_config.kv_cache_groups):
            sizes.append(group.kv_cache_spec.block_size)
            for name in group.layer_names:
                index = int(name.rpartition(".")[2])
                groups[index] = number
                # Layers that differ in shape alone may share a group.
                own = getattr(group.kv_cache_spec, "kv_cache_specs", {})
                page_bytes[index] = own.get(name, group.kv_cache_spec).page_size_bytes
        self._check_pages(sizes, groups, page_bytes)
        dtype = MLX_DTYPES[self.model_config.dtype]
        by_region: list[PagePool] = []
        pools: dict[int, PagePool] = {}
        for names in vllm_bridge.layers_by_region(kv_cache_config):
            indices = [int(name.rpartition(".")[2]) for name in names]
            pool = PagePool(kv_cache_config.num_blocks, page_bytes[indices[0]], dtype)
            by_region.append(pool)
            pools |= dict.fromkeys(indices, pool)
        mx.eval([pool.pages for pool in by_region])
        memory = Memory(
            self.served.layers,
            pools,
            groups,
            sizes,
            keep_boundaries=bool(self.cache_config.enable_prefix_caching),
        )
        self.runner = ModelRunner(self.served.model, memory, TokenSampler(self.vllm_config))
        held = sum(pool.nbytes for pool in memory.distinct_pools)
        need = kv_specs.demand(self.vllm_config, self.served.layers)
        fit = need.sequences(kv_cache_config.num_blocks)
        logger.info(
            "%s tokens fit, in %.1f sequences of %d: %d pages of %d tokens, %.1f MiB held in %d "
            "pool%s; %s",
            f"{int(fit * need.length):,}",
            fit,
            need.length,
            kv_cache_config.num_blocks,
            self.cache_config.block_size,
            held / 2**20,
            len(by_region),
            "s" if len(by_region) > 1 else "",
            self.budget,
        )

    def _check_pages(
        self, sizes: list[int], groups: dict[int, int], page_bytes: dict[int, int]
    ) -> None:
        """See that pages hold whole tokens and no more, which addressing takes for granted.

        Raises:
            UnsupportedServingError: shapes for which vLLM padded pages.
        """
        for layer in self.served.layers:
            if isinstance(layer, AttentionLayer):
                block = sizes[groups[layer.index]]
                exact = block * layer.token_bytes
                if exact != page_bytes[layer.index]:
                    raise UnsupportedServingError(
                        f"The embedded MLX backend cannot page layer {layer.index}: {block} tokens "
                        f"of it take {exact} bytes and a page has {page_bytes[layer.index]}, since "
                        "the model's layers differ in shape; use mlx-lm's own server for it."
                    )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Run every kind of pass once and compare with mlx-lm's own caches.

        Raises:
            UnsupportedServingError: the paged result differs.
        """
        start = time.perf_counter()
        self_check.run(self.runner)
        torch.manual_seed(self.model_config.seed)
        return CompilationTimes(language_model=time.perf_counter() - start, encoder=0.0)

    def update_max_model_len(self, max_model_len: int) -> None:
        """Take the length that vLLM fitted to the memory."""
        self.model_config.max_model_len = max_model_len

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Forward passes of a step; None means that ``sample_tokens`` is due."""
        return self.runner.execute(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | StepOutput:
        """Tokens of the step that was executed last, or what to wait for them with."""
        return self.runner.sample(grammar_output)

    def take_draft_token_ids(self) -> None:
        """No drafts."""

    def get_supported_tasks(self) -> tuple[str, ...]:
        """Text generation."""
        return ("generate",)

    def get_model(self) -> Any:
        """The mlx-lm model."""
        return self.served.model

    def synchronize_device(self) -> None:
        """Wait for the pass that runs, if one does."""
        mx.synchronize()

    def occupancy(self) -> dict[str, int]:
        """How many requests and states are held; none when nobody asks for anything."""
        return {
            "requests": len(self.runner.batch.requests),
            "states": len(self.runner.memory.states.resident),
        }

    def check_health(self) -> None:
        """Healthy as long as it answers."""

    def profile(self, is_start: bool = True, profile_prefix: str | None = None) -> None:
        """Refuse: there is no torch profile of MLX.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the embedded MLX backend has no profiler")

    def shutdown(self) -> None:
        """Give the memory back."""
        mx.synchronize()
        resident = psutil.Process().memory_info().rss / 2**20
        for name in ("runner", "served"):
            self.__dict__.pop(name, None)
        mx.clear_cache()
        logger.info("worker shut down (it held %.0f MiB)", resident)
