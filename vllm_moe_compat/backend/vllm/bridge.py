"""Differences between vLLM's releases, and vLLM's assumptions about hardware.

Only this file, ``bridge_kv``, for plans of KV caches, and ``bridge_speculation`` know which vLLM
is installed. Differences are detected by the thing itself (a field, a parameter) and not by version
number, since vllm-metal and nightlies number their builds differently. Each function says how
releases differ, why that matters here, and when it, or a branch of it, can be removed.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import inspect
import logging
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from wrapt import register_post_import_hook

from vllm_moe_compat.log import logger
from vllm_moe_compat.versions import TESTED, judge

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput


# --- the release as a whole ---------------------------------------------------


@functools.cache
def warn_outside_tested_range() -> None:
    """Warn once, in the process that vLLM was started as, if this vLLM was not tested."""
    if multiprocessing.parent_process() is not None:
        return
    version = importlib.metadata.version("vllm")
    if judge(version, TESTED["vllm"]) == "out of range":
        logger.warning(
            "vLLM %s is outside the range that the embedded MLX backend is tested with (%s). "
            "It may work, or fail at start-up with a missing name or argument. The self-check at "
            "start-up compares its logits with mlx-lm's, so wrong tokens are unlikely. If it "
            "fails, use a vLLM of that range.",
            version,
            TESTED["vllm"],
        )


# --- hardware -----------------------------------------------------------------


def allow_shutdown_without_accelerator() -> None:
    """Let vLLM's shutdown finish on a host without a torch accelerator.

    ``cleanup_dist_env_and_memory`` empties the accelerator's cache on every platform except
    vLLM's own CPU platform, and torch raises an error if there is none, so the engine process
    ends with a traceback. vLLM calls it after ``Worker.shutdown``, so the replacement has to stay
    until the process ends. Remove when vLLM checks ``torch.accelerator.is_available()`` first.
    """
    if torch.accelerator.is_available():
        return

    def nothing_to_empty() -> None:
        """Do nothing: without an accelerator there is no cache."""

    torch.accelerator.empty_cache = nothing_to_empty
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache = nothing_to_empty


def sample_without_triton() -> None:
    """Let vLLM's sampler apply top-k and top-p with torch; idempotent.

    Beside a GPU, vLLM uses its Triton kernels on every platform except its own CPU platform, but
    our logits are on the host. Remove when vLLM decides by the logits' device.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


# --- configuration ------------------------------------------------------------


def allow_one_head_size_for_all_layers() -> None:
    """Let vLLM 0.27 read the head size of a Gemma 4 config; idempotent.

    In current transformers such a config refuses the question, since the size varies by layer,
    unless it is told that the caller knows. vLLM 0.27 takes the larger size and does not tell it.
    Model configs are made at any time, so the replacement stays. Remove when 0.27 leaves the
    tested range.
    """
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    gemma = convertors.Gemma4ModelArchConfigConvertor
    get_head_size = vars(gemma).get("get_head_size")
    if get_head_size is None or hasattr(get_head_size, "__wrapped__"):
        return

    @functools.wraps(get_head_size)
    def get_largest_head_size(self: Any) -> int:
        self.hf_text_config.allow_global_per_layer_attribute_access = True
        size: int = get_head_size(self)
        return size

    gemma.get_head_size = get_largest_head_size


NO_QUANTIZATION_CONFIG: Mapping[str, Any] = MappingProxyType({})
"""Default argument of quantisation config classes.

vLLM 0.27 constructs the class named by ``--quantization`` without arguments if the checkpoint has
no quantisation config; 0.32 always passes one. Remove when 0.27 leaves the tested range.
"""


def watermark_config(vllm_config: VllmConfig) -> Any:
    """Return the watermark settings; 0.27 has none."""
    return getattr(vllm_config, "watermark_config", None)


def reasoning_config(vllm_config: VllmConfig) -> Any:
    """Return the reasoning settings for vLLM's ``InputBatch``; not every release has them."""
    return getattr(vllm_config, "reasoning_config", None)


def without_speculation(vllm_config: VllmConfig) -> VllmConfig:
    """Return the config as if there was no speculation, for vLLM's logits processors.

    With it, vLLM leaves out those of ``min_p`` and ``logit_bias`` and refuses foreign ones, since
    they would be given the rows of several positions at once. Here they are called position by
    position. Remove when vLLM makes all of them.
    """
    if vllm_config.speculative_config is None:
        return vllm_config
    vllm_config = copy.copy(vllm_config)
    vllm_config.speculative_config = None
    return vllm_config


def cpu_offload_gb(vllm_config: VllmConfig) -> float:
    """Return ``--cpu-offload-gb``, which newer releases keep in a config of its own."""
    offload = getattr(getattr(vllm_config, "offload_config", None), "uva", None)
    return float(getattr(offload, "cpu_offload_gb", 0))


def context_parallel_size(vllm_config: VllmConfig) -> int:
    """Return the larger size of context parallelism, of prefills and of decoding."""
    parallel = vllm_config.parallel_config
    sizes = ("prefill_context_parallel_size", "decode_context_parallel_size")
    return max(int(getattr(parallel, name, 1)) for name in sizes)


def shards_sampling(vllm_config: VllmConfig) -> bool:
    """Return ``--enable-batch-sharded-sampling``, which 0.27 does not have."""
    return bool(getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", False))


class DefaultShare(float):
    """vLLM's default of ``--gpu-memory-utilization``, known not to have been given."""


def mark_default_memory_share(vllm_config: VllmConfig) -> None:
    """Mark ``gpu_memory_utilization`` as a default, if it is one; to be called where it was set.

    vLLM does not say whether a value was given. But its arguments hand on the very object that
    is their default, up to the pickling for the engine's process, and a given 0.92 is another
    object. There are two such defaults, of ``EngineArgs`` and of ``LLM``.
    """
    from vllm.config import CacheConfig

    defaults: list[object] = [CacheConfig.gpu_memory_utilization]
    offline = sys.modules.get("vllm.entrypoints.llm")
    if offline is not None:
        parameters = inspect.signature(offline.LLM.__init__).parameters
        defaults.append(parameters["gpu_memory_utilization"].default)
    cache = vllm_config.cache_config
    if any(cache.gpu_memory_utilization is default for default in defaults):
        cache.gpu_memory_utilization = DefaultShare(cache.gpu_memory_utilization)


def given_memory_share(vllm_config: VllmConfig) -> float | None:
    """Return ``--gpu-memory-utilization``, or None if it was not given."""
    share: float = vllm_config.cache_config.gpu_memory_utilization
    return None if isinstance(share, DefaultShare) else share


def returns_routed_experts(model_config: ModelConfig) -> bool:
    """Return ``--enable-return-routed-experts``, which 0.27 does not have."""
    return bool(getattr(model_config, "enable_return_routed_experts", False))


# --- requests -----------------------------------------------------------------

NEUTRAL_SAMPLING_FIELDS = frozenset(
    {
        # number, length and form of the answers
        *("n", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "repetition_detection"),
        *("_eos_token_id", "_all_stop_token_ids", "output_kind", "stream_interval"),
        *("detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
        *("include_stop_str_in_output", "output_text_buffer_length", "flat_logprobs"),
        # log-probabilities of the prompt, which prefill passes compute
        *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
        # internal to vLLM's engine
        *("skip_clone", "skip_reading_prefix_cache", "routed_experts_prompt_start"),
        "_watermarking_skipped",
    }
)
"""Fields of ``SamplingParams``, of all releases, that do not affect which token is drawn."""

RESOLVED_SAMPLING_FIELDS: Mapping[str, Any] = MappingProxyType({"watermarking": False})
"""Values that newer releases write in place of a default, where they mean the same."""


def without_unreachable_ids(params: Any, count: int) -> Any:
    """Return ``SamplingParams`` without stop tokens and forbidden words of ids from ``count`` on.

    No such token can be drawn, so nothing is lost. vLLM takes them from tokenizer and generation
    config, which may have more tokens than the model, and indexes logits with them. Remove when
    it leaves them out itself.
    """
    stops = {token for token in params._all_stop_token_ids if 0 <= token < count}
    words = params._bad_words_token_ids
    if words is not None:
        words = [word for word in words if all(0 <= token < count for token in word)]
    if stops == params._all_stop_token_ids and words == params._bad_words_token_ids:
        return params
    params = copy.copy(params)
    params._all_stop_token_ids, params._bad_words_token_ids = stops, words
    return params


def input_kind(processed_inputs: Any) -> str | None:
    """Return the ``type`` of a request's inputs; None where the release's inputs have none."""
    kind: str | None = processed_inputs.get("type") if hasattr(processed_inputs, "get") else None
    return kind


_facts: ContextVar[Any] = ContextVar("facts of the engine that checks a request", default=None)


def remember_facts_of_engines(facts_of: Callable[[ModelConfig, Any], Any]) -> None:
    """Let ``facts_of_engine`` answer while vLLM's front end checks a request; idempotent.

    ``Platform.validate_request`` is not told for which engine a request is, and a process may
    have several. So the front end's ``InputProcessor`` keeps what ``facts_of`` returns for its
    model config and its tokenizer (None without one), and names it during a check. The class may
    not be imported yet, and engine processes never do. Remove when ``validate_request`` gets the
    config.
    """
    register_post_import_hook(
        functools.partial(_remember_facts, facts_of), "vllm.v1.engine.input_processor"
    )


def _remember_facts(facts_of: Callable[[ModelConfig, Any], Any], module: Any) -> None:
    kind = module.InputProcessor
    if "moe_compat_facts" in vars(kind):
        return
    kind.moe_compat_facts = None
    begin, process = kind.__init__, kind.process_inputs

    @functools.wraps(begin)
    def begin_with_facts(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self.moe_compat_facts = facts_of(self.model_config, self.tokenizer)

    @functools.wraps(process)
    def process_with_facts(self: Any, *args: Any, **options: Any) -> Any:
        token = _facts.set(self.moe_compat_facts)
        try:
            return process(self, *args, **options)
        finally:
            _facts.reset(token)

    kind.__init__, kind.process_inputs = begin_with_facts, process_with_facts


def facts_of_engine() -> Any:
    """Return the facts of the engine for which a request is checked; None outside of a check."""
    return _facts.get()


def prompt_ids(processed_inputs: Any) -> list[int]:
    """Return the token ids of a request's inputs; empty where they are of another kind."""
    found = processed_inputs.get("prompt_token_ids") if hasattr(processed_inputs, "get") else None
    return list(found or ())


def input_batch_blocks(block_sizes: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of vLLM's ``InputBatch`` about blocks, one table entry per group.

    Up to 0.31 it also requires the block sizes of attention kernels. The blocks that it records
    are not used here, since the backend addresses pages itself.
    """
    from vllm.v1.worker.gpu_input_batch import InputBatch

    sizes = list(block_sizes)
    arguments = {"block_sizes": sizes, "max_num_blocks_per_req": [1] * len(sizes)}
    if "kernel_block_sizes" in inspect.signature(InputBatch).parameters:
        arguments["kernel_block_sizes"] = sizes
    return arguments


def condense(batch: Any) -> None:
    """Close the gaps of vLLM's ``InputBatch``.

    0.27 leaves the mask of ``allowed_token_ids`` in the row from which a request moves, where it
    would bind the next request that joins there. Remove when 0.27 leaves the tested range.
    """
    end = len(batch.req_ids)
    batch.condense()
    mask = batch.allowed_token_ids_mask_cpu_tensor
    if mask is not None:
        mask[batch.num_reqs : end] = False


# --- the scheduler ------------------------------------------------------------


def run_one_batch_of_a_pipeline() -> None:
    """Have vLLM schedule a step of a pipeline when the one before has ended; idempotent.

    vLLM schedules one per rank, of different requests. Here a pass ends on all ranks at once, so
    all requests are in one; and drafts for the requests of one batch would come in while another
    one runs. Engines read this in a process of their own. Remove when the executor says it.
    """
    from vllm.config import VllmConfig

    count: Callable[[VllmConfig], int] = vars(VllmConfig)["max_concurrent_batches"].fget
    if hasattr(count, "__wrapped__"):
        return

    @functools.wraps(count)
    def count_once(self: VllmConfig) -> int:
        if not str(self.parallel_config.distributed_executor_backend).startswith(
            "vllm_moe_compat."
        ):
            return count(self)
        return 2 if self.scheduler_config.async_scheduling else 1

    VllmConfig.max_concurrent_batches = property(count_once)


class _OurSchedulerIsTested(logging.Filter):
    """Drops the warning that a scheduler of another class may be incompatible, for ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any("vllm_moe_compat" in str(part) for part in record.args or ())


def accept_own_scheduler() -> None:
    """Let vLLM make a scheduler of this package without a warning; idempotent.

    vLLM warns of any class that is not its own, and says that async scheduling is off, which is
    wrong for a subclass of its async scheduler. The warning of other classes stays. To be called
    in the engine's process, before it makes the scheduler. Remove when vLLM ends a request for
    which its model runner reports a failure.
    """
    reporter = logging.getLogger("vllm.config.scheduler")
    if not any(isinstance(one, _OurSchedulerIsTested) for one in reporter.filters):
        reporter.addFilter(_OurSchedulerIsTested())


# --- scheduler output ---------------------------------------------------------


def uses_v2_encoding(output: SchedulerOutput) -> bool:
    """Return whether a new request is in the encoding of vLLM's V2 model runner.

    V2 sends a preempted request again as a new one, with all of its tokens in
    ``prefill_token_ids``; V1 sends it as a running one in ``resumed_req_ids``. Releases without
    V2 lack the field.
    """
    return any(
        getattr(request, "prefill_token_ids", None) is not None
        for request in output.scheduled_new_reqs
    )


def page_copies(output: SchedulerOutput) -> tuple[tuple[int, int], ...]:
    """Return (source, destination) of blocks to copy; releases without copy-on-write have none."""
    copies = getattr(output, "kv_cache_block_copies", None) or ()
    return tuple((int(source), int(destination)) for source, destination in copies)
