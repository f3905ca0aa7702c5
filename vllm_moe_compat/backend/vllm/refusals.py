"""Settings of vLLM that the embedded backend does not support.

Every such setting is refused at start-up with its remedy, since ignoring it would change answers.
A setting that is not listed here either works or has no meaning on a single device.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_moe_compat.backend.vllm import bridge, data_parallel, rank_refusals, speculation

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OPEN_FILES = 4096
"""The hard limit of open files that mlx-lm sets when it is imported."""
LOAD_FORMATS = ("auto", "hf", "safetensors")


def first(vllm_config: VllmConfig) -> str | None:
    """Return the first unsupported setting and its remedy, or None."""
    return next((text for is_set, text in _settings(vllm_config) if is_set), None)


def _settings(vllm_config: VllmConfig) -> Iterator[tuple[Any, str]]:
    """Yield whether each unsupported setting is set, and its message."""
    model = vllm_config.model_config
    yield from data_parallel.refused(vllm_config)
    yield from rank_refusals.settings(vllm_config)
    speculative = speculation.first_refusal(vllm_config)
    yield speculative, speculative or ""
    yield vllm_config.lora_config, "LoRA adapters; merge them into the checkpoint."
    yield vllm_config.kv_transfer_config, "KV transfer; leave --kv-transfer-config out."
    yield (
        bridge.watermark_config(vllm_config),
        "watermarks in the text, which only vLLM's V2 model runner supports; leave them out.",
    )
    yield (
        bridge.cpu_offload_gb(vllm_config),
        "weights offloaded; leave --cpu-offload-gb at 0, and set VLLM_MOE_COMPAT_EXPERT_CACHE to "
        "keep experts on disk.",
    )
    yield (
        _foreign_scheduler(vllm_config.scheduler_config.scheduler_cls),
        "--scheduler-cls: a request that cannot be computed is ended by a scheduler of its own; "
        "leave it out.",
    )
    load_format = str(vllm_config.load_config.load_format)
    yield (
        load_format not in LOAD_FORMATS,
        f"--load-format {load_format}: mlx-lm reads safetensors files; use auto.",
    )
    yield (
        not _open_files_allowed(),
        f"a hard limit below {OPEN_FILES} open files, to which mlx-lm sets it when it is imported; "
        f"raise it, for instance with ulimit -n {OPEN_FILES}.",
    )
    if model is None:  # Some of vLLM's own tools make configurations without one.
        return
    cache = vllm_config.cache_config
    yield (
        model.runner_type != "generate",
        "this runner: it generates text only; use --runner generate.",
    )
    yield (
        cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
        f"--kv-cache-dtype {cache.cache_dtype}; the cache has the model's dtype: use auto.",
    )
    yield (
        cache.mamba_cache_mode == "all",
        "--mamba-cache-mode all; use align, which --enable-prefix-caching selects.",
    )
    yield (
        model.hf_overrides,
        "--hf-overrides, which mlx-lm would not see; change the checkpoint's config.json.",
    )
    yield (
        model.quantization and not _quantized(model.hf_config),
        f"--quantization {model.quantization}: the checkpoint is not quantised, and weights are "
        "not quantised while loading; leave it out, or convert the checkpoint with mlx_lm.convert.",
    )
    yield (
        bridge.returns_routed_experts(model),
        "routed experts in the answers; leave --enable-return-routed-experts out.",
    )


def _foreign_scheduler(scheduler: Any) -> bool:
    return scheduler is not None and not str(scheduler).startswith("vllm_moe_compat.")


def _open_files_allowed() -> bool:
    """Whether mlx-lm may set its limit; one that is too low is raised where that is permitted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= OPEN_FILES:
        return True
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, OPEN_FILES))
    except (OSError, ValueError):
        return False
    return True


def _quantized(config: Any) -> bool:
    sections = (config, getattr(config, "text_config", None))
    names = ("quantization_config", "quantization", "compression_config")
    return any(getattr(section, name, None) for section in sections for name in names)
