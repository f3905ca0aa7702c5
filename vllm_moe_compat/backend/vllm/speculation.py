"""``--speculative-config`` as this backend reads it, and what of it is not supported.

vLLM's scheduler gives out drafts and takes back what was accepted; where drafts come from, and how
they are verified, is the backend's. Drafts come from n-grams of the request's own text or from
the checkpoint's own prediction heads (MTP). Each draft is compared with a token that the target's
sampler has drawn, so nothing about drafts changes an answer; a setting that asks for another
verification, or for other drafts, is refused by name, and so is one that no release had so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vllm_moe_compat.envs import EXPERT_CACHE
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan.expert_cache import CacheSetting

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

METHODS: Mapping[str, str] = {
    "ngram": "",
    "mtp": "",
    "ngram_gpu": "text is searched on the host",
    "suffix": "suffix trees are not kept between requests",
    "draft_model": "no second model is loaded",
    "eagle": "no second model is loaded",
    "eagle3": "no second model is loaded",
    "dflash": "no second model is loaded",
    "dspark": "its drafts are made for vLLM's V2 model runner",
    "medusa": "no second model is loaded",
    "mlp_speculator": "no second model is loaded",
    "extract_hidden_states": "hidden states are not stored",
    "custom_class": "vLLM's interface of such classes belongs to its own model runner",
}
"""vLLM's methods, and why each is refused; those with an empty reason are served."""
SERVED = (
    "use ngram, or mtp if the checkpoint has prediction heads of its own (inspect says whether)"
)

HARMLESS = frozenset(
    {
        *("method", "model", "num_speculative_tokens", "num_speculative_tokens_per_batch_size"),
        *("prompt_lookup_max", "prompt_lookup_min"),
        # vLLM refuses them with a sentence of its own.
        *("tensor_parallel_size", "use_heterogeneous_vocab"),
        # How vLLM's model runner and its kernels compute drafts.
        *("enforce_eager", "moe_backend", "attention_backend", "disable_padded_drafter_batch"),
        *("draft_tensor_parallel_size", "use_local_argmax_reduction", "code_revision"),
        # Of sparse attention, which no served model has.
        "index_share_for_mtp_iteration",
        # vLLM's prefix cache reads it; it affects which drafts are made after a prefix hit.
        "disable_eagle_block_drop",
        # Of methods that are refused.
        *("suffix_decoding_max_tree_depth", "suffix_decoding_max_cached_requests"),
        *("suffix_decoding_max_spec_factor", "suffix_decoding_min_token_prob"),
        "dspark_draft_topk",
        # vLLM's own, once it has resolved the rest.
        *("target_model_config", "target_parallel_config"),
        *("draft_model_config", "draft_parallel_config"),
    }
)
"""Fields that are honoured, or that mean nothing for the methods that are served."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """How drafts are made.

    Attributes:
        method: ``ngram`` or ``mtp``.
        most: drafts of one request in one step; 0 on a rank whose drafts do not count.
        prompt_lookup_min: tokens of the shortest n-gram that is looked up.
        prompt_lookup_max: tokens of the longest one.
    """

    method: str
    most: int
    prompt_lookup_min: int = 0
    prompt_lookup_max: int = 0

    @property
    def needs_heads(self) -> bool:
        """Whether drafts come from the checkpoint's prediction heads."""
        return self.method == "mtp"


def read(vllm_config: VllmConfig) -> Speculation | None:
    """Return how drafts are made; None without speculation."""
    config = vllm_config.speculative_config
    if config is None:
        return None
    found = Speculation(config.method, int(config.num_speculative_tokens))
    if found.needs_heads:
        return found
    return Speculation(
        found.method, found.most, int(config.prompt_lookup_min), int(config.prompt_lookup_max)
    )


def settle(vllm_config: VllmConfig) -> None:
    """Turn async scheduling off, which vLLM leaves on for ``mtp``; idempotent.

    With it, vLLM schedules a step before the drafts of the one before are known or verified.
    """
    scheduler = vllm_config.scheduler_config
    if vllm_config.speculative_config is not None and scheduler.async_scheduling:
        scheduler.async_scheduling = False
        logger.info(
            "async scheduling is off, since a step is scheduled when its drafts are known "
            "(--speculative-config)"
        )


def first_refusal(vllm_config: VllmConfig) -> str | None:
    """Return the first unsupported setting of a resolved configuration and its remedy, or None."""
    config = vllm_config.speculative_config
    if config is None:
        return None
    set_here = {
        each.name: getattr(config, each.name)
        for each in fields(config)
        if getattr(config, each.name) != getattr(each.default, "default", each.default)
    }
    found = refusal(set_here, vllm_config.model_config)
    if found is None and config.method == "mtp":
        if vllm_config.parallel_config.world_size > 1:
            return (
                "--speculative-config with method mtp on several ranks: prediction heads are not "
                "divided between ranks; use ngram, or one rank."
            )
        if CacheSetting.read() is not None:
            return (
                "--speculative-config with method mtp while experts are on disk: those of "
                f"prediction heads are kept in memory; use ngram, or leave {EXPERT_CACHE.name} out."
            )
    return found


def refusal(given: Mapping[str, Any], model: ModelConfig) -> str | None:
    """Return the first unsupported field of ``given`` and its remedy, or None.

    ``given``: the fields of ``--speculative-config`` that are set, as the user wrote them or as
    vLLM resolved them.
    """
    return next((text for is_set, text in _settings(given, model) if is_set), None)


def _settings(given: Mapping[str, Any], model: ModelConfig) -> Iterator[tuple[Any, str]]:
    method = method_of(given, model)
    yield (
        METHODS.get(method, "it is unknown"),
        f"--speculative-config with method {method}: {METHODS.get(method, 'it is unknown')}; "
        f"{SERVED}.",
    )
    path, revision = given.get("model"), given.get("revision")
    yield (
        method == "mtp" and path is not None and not _is_served(path, model),
        f"--speculative-config with the model {path}: prediction heads are taken from the "
        "checkpoint that is served; leave model out.",
    )
    yield (
        method == "mtp" and revision not in (None, model.revision),
        f"--speculative-config with revision {revision}: prediction heads are taken from the "
        "checkpoint that is served; leave it out.",
    )
    verification = given.get("rejection_sample_method", "standard")
    yield (
        verification != "standard",
        f"--speculative-config with rejection_sample_method {verification}: a draft is accepted "
        "while it is what the target draws; leave it out.",
    )
    drawn = given.get("draft_sample_method", "greedy")
    yield (
        drawn != "greedy",
        f"--speculative-config with draft_sample_method {drawn}: drafts are a head's likeliest "
        "tokens; use greedy.",
    )
    quantization = given.get("quantization")
    yield (
        quantization not in (None, model.quantization),
        f"--speculative-config with quantization {quantization}: prediction heads keep the form "
        "in which the checkpoint stores them; leave it out.",
    )
    dtype = str(model.dtype).removeprefix("torch.")
    cache = given.get("kv_cache_dtype")
    yield (
        cache not in (None, "auto", dtype),
        f"--speculative-config with kv_cache_dtype {cache}: the cache has the model's dtype; "
        "leave it out.",
    )
    length = given.get("max_model_len")
    yield (
        length not in (None, model.max_model_len),
        f"--speculative-config with max_model_len {length}: drafts are made up to the model's own "
        "length; leave it out.",
    )
    others = {"rejection_sample_method", "draft_sample_method", "quantization", "kv_cache_dtype"}
    known = HARMLESS | others | {"max_model_len", "revision"}
    for name in sorted(given.keys() - known):
        value = given[name]
        yield (
            value is not None and value is not False,
            f"--speculative-config with {name}={value}: drafts here know no such setting; leave "
            "it out.",
        )


def method_of(given: Mapping[str, Any], model: ModelConfig) -> str:
    """Return the method that vLLM will find, without the names that it gives ``mtp`` by family."""
    from vllm.config import speculative

    method, path = given.get("method"), given.get("model")
    if method == "[ngram]" or (method is None and path in ("ngram", "[ngram]")):
        return "ngram"
    if method is None:
        # vLLM looks into a draft model's config; of one that is the target itself, only its
        # heads can be meant.
        return "mtp" if path is not None and _is_served(path, model) else "draft_model"
    return "mtp" if method in get_args(speculative.MTPModelTypes) else str(method)


def _is_served(path: str, model: ModelConfig) -> bool:
    """Return whether ``path`` names the served checkpoint, in whatever spelling of its folder."""
    served = (model.model, model.model_weights)
    if path in served:
        return True
    folder = Path(path).expanduser()
    return folder.is_dir() and any(
        Path(one).is_dir() and folder.samefile(one) for one in served if one
    )


def no_heads(model: ModelConfig) -> str:
    """Return the refusal of ``mtp`` for a checkpoint in which vLLM finds no prediction heads."""
    return (
        "The embedded MLX backend cannot serve with --speculative-config with method mtp: vLLM "
        f"finds no prediction heads in config.json of {model.model} (model_type "
        f"{model.hf_config.model_type}); use ngram, or leave it out."
    )
