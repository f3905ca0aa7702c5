"""vLLM's worker over MLX: one process, one device, one model.

vLLM calls the worker in this order: load the model, describe its KV cache, report the memory
available, take the KV cache plan, warm up, run steps. This file holds the life cycle; ``runner``
runs the steps, ``budget`` measures the memory, ``out_of_step`` answers all other calls.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import psutil
import torch
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_moe_compat.backend.model import kernels, loader, token_rows
from vllm_moe_compat.backend.step import head_check, self_check
from vllm_moe_compat.backend.vllm import (
    bridge,
    bridge_kv,
    drafters,
    executor,
    kv_specs,
    rank_group,
    speculation,
    stages,
)
from vllm_moe_compat.backend.vllm.allocation import allocate, layer_name
from vllm_moe_compat.backend.vllm.budget import Budget, measure
from vllm_moe_compat.backend.vllm.engine_process import EngineProcess
from vllm_moe_compat.backend.vllm.expert_cache_stats import ExpertCounts
from vllm_moe_compat.backend.vllm.expert_reads import warn_of_reads
from vllm_moe_compat.backend.vllm.length import limit_length
from vllm_moe_compat.backend.vllm.out_of_step import OutOfStepCalls, at_start_up
from vllm_moe_compat.backend.vllm.pausing import ask_worker_first
from vllm_moe_compat.backend.vllm.pending_output import PendingOutput
from vllm_moe_compat.backend.vllm.rank_group import RankGroup
from vllm_moe_compat.backend.vllm.rank_memory import processes_that_load
from vllm_moe_compat.backend.vllm.runner import ModelRunner
from vllm_moe_compat.backend.vllm.sampling import TokenSampler
from vllm_moe_compat.backend.vllm.sleep import SleepMode
from vllm_moe_compat.dtypes import mlx_dtype, stored_name
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.expert_cache import whole_model
from vllm_moe_compat.families.fixes import rotary
from vllm_moe_compat.load.memory import give_back
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput


class MlxWorker(OutOfStepCalls):
    """The worker class that ``MlxPlatform`` names."""

    budget: Budget
    ranks: RankGroup | None = None
    _failure: Exception | None = None

    @at_start_up
    def init_device(self) -> None:
        """Set the seeds; MLX selects its device itself."""
        self.speculation = speculation.read(self.vllm_config)
        bridge.allow_shutdown_without_accelerator()
        bridge.accept_own_scheduler()
        ask_worker_first()
        if self.parallel_config.world_size > 1:
            self.process = EngineProcess(f"rank {self.rank}", "the engine")
        else:
            self.process = EngineProcess()
        self.process.starting()
        kernels.settle()
        self._expert_counts = ExpertCounts()
        self.device = torch.device("cpu")
        self.ranks = rank_group.join(
            self.vllm_config, self.rank, self.local_rank, self.distributed_init_method
        )
        if self.speculation and self.ranks and self.rank != self.ranks.source:
            # vLLM takes the drafts of one rank.
            self.speculation = replace(self.speculation, most=0)
        torch.manual_seed(self.model_config.seed)
        mx.random.seed(self.model_config.seed)
        mx.reset_peak_memory()

    @at_start_up
    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the checkpoint, and choose page sizes that suit all kinds of its layers.

        Raises:
            CompatError: the checkpoint or the model cannot be served.
        """
        together = processes_that_load(self.vllm_config, self.ranks)
        self.served = self._load(self.model_config.model, self.model_config.revision, together)
        limit_length(self.model_config, self.served.max_length, self.served.max_length_reason)
        warn_of_reads(self.served.expert_cache, self.scheduler_config.max_num_seqs)
        self._settle(self.served)
        heads = self.served.heads.layers if self.served.heads else ()
        self.all_layers = stages.all_layers(self.served.layers, self.ranks, heads)
        kv_specs.align_pages(self.vllm_config, self.all_layers.paged)

    @property
    def _needs_heads(self) -> bool:
        found = speculation.read(self.vllm_config)
        return found is not None and found.needs_heads

    def _load(self, model: str, revision: str | None, together: int = 1) -> loader.ServedModel:
        dtype = mlx_dtype(stored_name(self.model_config.dtype))
        progress = self.load_config.use_tqdm_on_load
        with loading_with(progress=progress, processes=together):
            return loader.load(
                model,
                revision,
                dtype,
                self.ranks.group if self.ranks else None,
                stages.range_of(self.vllm_config),
                heads=self._needs_heads,
            )

    def _settle(self, served: loader.ServedModel) -> None:
        if chosen := rotary.settle(served.model, self.model_config.max_model_len):
            logger.info("%s: %s", served.stamps.folder, chosen)
        if served.heads is not None:
            rotary.settle(served.heads, self.model_config.max_model_len)

    def _load_again(self, folder: Path) -> loader.ServedModel:
        served = self._load(str(folder), None)
        self._settle(served)
        return served

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Return vLLM's KV cache spec of each layer by its name."""
        found = kv_specs.specs(self.vllm_config, self.all_layers.paged)
        return {layer_name(index): found[index] for index in self.all_layers.own_paged}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Return the layout with layers outermost: the pages of a layer are one array."""
        return ["LBNHC"]

    @at_start_up
    def determine_available_memory(self) -> int:
        """Return the bytes for pages, after weights, activations and resident states.

        Raises:
            UnsupportedServingError: nothing is left.
        """
        self.budget = measure(self.vllm_config, self.served, self.all_layers.paged, self.ranks)
        return self.budget.page_bytes

    @at_start_up
    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the pages that vLLM planned, and make the runner.

        Raises:
            UnsupportedServingError: a sequence of the maximum length does not fit.
        """
        bridge_kv.leave_room_for_the_null_block(self.vllm_config, kv_cache_config)
        storage = allocate(
            kv_cache_config,
            self.served,
            self.all_layers,
            mlx_dtype(stored_name(self.model_config.dtype)),
            keep_boundaries=bool(self.cache_config.enable_prefix_caching),
        )
        sampler = TokenSampler(self.vllm_config, token_rows.of_model(self.served.model))
        compiles = not self.model_config.enforce_eager
        self.runner = ModelRunner(
            self.served.model,
            storage,
            sampler,
            compiles=compiles,
            ranks=self.ranks,
            expert_counts=self._expert_counts,
            drafting=drafters.make(
                self.speculation,
                self.model_config.max_model_len,
                self.served.heads,
                storage,
                sampler.rows.embedding,
            ),
        )
        pools = storage.all_pools
        need = kv_specs.demand(self.vllm_config, self.all_layers.layers)
        fit = need.sequences(kv_cache_config.num_blocks)
        logger.info(
            "%s tokens fit, in %.1f sequences of %d: %d pages of %d tokens, %.1f MiB held in %d "
            "pool%s; %s",
            f"{int(fit * need.length):,}",
            fit,
            need.length,
            kv_cache_config.num_blocks,
            self.cache_config.block_size,
            sum(pool.nbytes for pool in pools) / 2**20,
            len(pools),
            "s" if len(pools) > 1 else "",
            self.budget,
        )

    @at_start_up
    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Run every kind of pass once and compare with mlx-lm's own caches.

        Raises:
            UnsupportedServingError: the paged result differs.
        """
        start = time.perf_counter()
        with ExitStack() as on_failure:
            # vLLM may not call ``shutdown`` on a worker that failed to start.
            on_failure.callback(self.runner.close)
            self_check.run(self.runner.forward, self.all_layers.layers)
            if self.runner.drafting is not None and self.runner.drafting.follower is not None:
                head_check.run(self.runner.drafting.follower.passes)
            on_failure.pop_all()
        torch.manual_seed(self.model_config.seed)
        enabled = bool(self.model_config.enable_sleep_mode)
        self.sleep_mode = SleepMode(self, self._load_again, enabled=enabled)
        self.process.started()
        return CompilationTimes(language_model=time.perf_counter() - start, encoder=0.0)

    @at_start_up
    def update_max_model_len(self, max_model_len: int) -> None:
        """Take the length that vLLM fitted to the memory."""
        self.model_config.max_model_len = max_model_len
        self._settle(self.served)

    def settled_settings(self) -> dict[str, Any]:
        """Return settings that this worker may have changed; see ``executor``."""
        return executor.settled(self.vllm_config)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run the forward passes of a step; None means that ``sample_tokens`` must follow.

        Raises:
            UnsupportedServingError: the worker sleeps, or was shut down.
        """
        if "runner" not in vars(self):
            raise UnsupportedServingError("The worker was shut down; start another server.")
        if self.sleep_mode.asleep:
            if scheduler_output.total_num_scheduled_tokens:
                self.sleep_mode.refuse_resume()
            return self.runner.take_note(scheduler_output)
        try:
            if self.ranks is None:
                return self.runner.execute_model(scheduler_output)
            self.ranks.heartbeat.progress()
            with self.ranks.heartbeat.naming():
                return self.runner.execute_model(scheduler_output)
        except Exception as error:
            # vLLM asks for the tokens before it looks at this error, and reports that answer.
            self._failure = error
            raise

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | PendingOutput:
        """Return the tokens of the last step, or an output that waits for them."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        with self.ranks.heartbeat.naming() if self.ranks else nullcontext():
            return self.runner.sample_tokens(grammar_output)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Return the drafts for the next step; None without speculation."""
        return self.runner.take_draft_token_ids()

    def occupancy(self) -> dict[str, int]:
        """Return the number of requests and resident states; 0 when the server is idle."""
        return {
            "requests": len(self.runner.batch.requests),
            "states": len(self.runner.storage.states.resident),
        }

    def shutdown(self) -> None:
        """Remove the attention hook and release the memory; idempotent."""
        if self.ranks is not None:
            self.ranks.heartbeat.close()
        mx.synchronize()
        resident = psutil.Process().memory_info().rss / 2**20
        runner = self.__dict__.pop("runner", None)
        if runner is not None:
            runner.close()
        served = self.__dict__.pop("served", None)
        if served is not None:
            whole_model.close(served.model)
        del served
        del runner
        give_back()
        logger.info("worker shut down (it held %.0f MiB)", resident)
