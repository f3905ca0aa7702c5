"""vLLM's assumptions about speculation that do not hold here; see ``bridge``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from vllm_moe_compat.errors import UnsupportedServingError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

Check = Callable[[Mapping[str, Any], Any], str | None]


def check_before_vllm(refusal: Check, no_heads: Callable[[ModelConfig], str]) -> None:
    """Let ``refusal`` read ``--speculative-config`` before vLLM acts on it; idempotent.

    vLLM asks for packages and reads draft models before the platform sees the configuration, and
    has no sentence for a checkpoint without prediction heads: it raises ``NotImplementedError``
    for a family that it knows none of, ``ZeroDivisionError`` if the config says 0. ``no_heads``
    returns that sentence. Remove when a platform is asked for the methods that it supports.
    """
    register_post_import_hook(
        functools.partial(_check_before_vllm, refusal, no_heads), "vllm.engine.arg_utils"
    )


def _check_before_vllm(refusal: Check, no_heads: Callable[[ModelConfig], str], module: Any) -> None:
    create = module.EngineArgs.create_speculative_config
    if hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_checked(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        given = _given(self)
        text = refusal(given, target_model_config) if given else None
        if text:
            raise UnsupportedServingError(f"The embedded MLX backend cannot serve with {text}")
        try:
            return create(self, target_model_config, target_parallel_config)
        except (NotImplementedError, ZeroDivisionError) as error:
            raise UnsupportedServingError(no_heads(target_model_config)) from error

    module.EngineArgs.create_speculative_config = create_checked


FLAGS = (("spec_method", "method"), ("spec_model", "model"))
"""Arguments that set a field; ``--spec-tokens`` sets none that is refused."""


def _given(arguments: Any) -> dict[str, Any]:
    """Return the fields that are set by ``--speculative-config`` and by flags of their own."""
    written = arguments.speculative_config or {}
    given = {name.replace("-", "_"): value for name, value in written.items()}
    for flag, name in FLAGS:
        if getattr(arguments, flag) is not None:
            given.setdefault(name, getattr(arguments, flag))
    return given


def read_heads_of_text_configs() -> None:
    """Let vLLM 0.27 find the heads of a Qwen3.5 that was saved without its vision part; idempotent.

    It knows the heads of ``qwen3_5_moe`` and not those of ``qwen3_5_moe_text``, which have the
    same config; 0.32 knows both. Remove when 0.27 leaves the tested range.
    """
    from vllm.config.speculative import SpeculativeConfig

    override = SpeculativeConfig.hf_config_override
    if hasattr(override, "__wrapped__"):
        return

    @functools.wraps(override)
    def override_text_too(hf_config: Any) -> Any:
        if hf_config.model_type in ("qwen3_5_text", "qwen3_5_moe_text"):
            hf_config.model_type = hf_config.model_type.removesuffix("_text")
        return override(hf_config)

    SpeculativeConfig.hf_config_override = staticmethod(override_text_too)


def accept_all_parameters() -> None:
    """Let vLLM's front end accept ``min_p`` and ``logit_bias`` beside speculation; idempotent.

    It refuses requests with them, since its own sampler would be given the logits of several
    positions at once. Here each position is drawn as without drafts. Remove when it asks the
    platform.
    """
    from vllm.sampling_params import SamplingParams

    def accept(self: Any, speculative_config: Any) -> None:
        """Accept every parameter."""

    if "_validate_spec_decode" in vars(SamplingParams):
        SamplingParams._validate_spec_decode = accept


def drop_tokens_behind_stop_strings() -> None:
    """Let vLLM 0.27 end a request at the token that completes a stop string; idempotent.

    A step that accepts drafts gives several tokens. 0.27 leaves those behind the stop string out
    of the text, but not out of the tokens and log-probabilities. Remove when 0.27 leaves the
    tested range.
    """
    register_post_import_hook(_drop_tokens_behind_stop_strings, "vllm.v1.engine.output_processor")


def _drop_tokens_behind_stop_strings(module: Any) -> None:
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer

    processor = module.LogprobsProcessor
    update, update_logprobs = BaseIncrementalDetokenizer.update, processor.update_from_output
    if hasattr(module.OutputProcessor, "_trim_surplus_tokens") or hasattr(update, "__wrapped__"):
        return

    @functools.wraps(update)
    def update_one_by_one(self: Any, new_token_ids: list[int], stop_terminated: bool) -> Any:
        if not self.stop:
            return update(self, new_token_ids, stop_terminated)
        last = len(new_token_ids) - 1
        for place, token in enumerate(new_token_ids):
            stop = update(self, [token], stop_terminated and place == last)
            if stop is not None:
                # The list is that of the output, from which vLLM goes on.
                del new_token_ids[place + 1 :]
                return stop
        return None

    @functools.wraps(update_logprobs)
    def update_logprobs_of_kept(self: Any, output: Any) -> None:
        if output.new_logprobs is not None:
            output.new_logprobs = output.new_logprobs.slice_request(0, len(output.new_token_ids))
        update_logprobs(self, output)

    BaseIncrementalDetokenizer.update = update_one_by_one
    processor.update_from_output = update_logprobs_of_kept
