"""``--speculative-config``: what is read, what is refused, and what vLLM makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from vllm import SamplingParams
from vllm.config import VllmConfig, speculative
from vllm.engine.arg_utils import EngineArgs

from vllm_moe_compat.backend.vllm import draft_memory, model_stubs
from vllm_moe_compat.backend.vllm import speculation as ours

NGRAM = {"method": "ngram", "num_speculative_tokens": 2}
MTP = {"method": "mtp", "num_speculative_tokens": 1}
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128},
    **{"max_position_embeddings": 512, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    **{"num_experts": 4, "n_routed_experts": 4, "num_nextn_predict_layers": 1},
}
LATENT = {
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16},
    **{"q_lora_rank": 16, "n_group": 1, "topk_group": 1},
}
GATED_DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16},
    **{"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "mtp_num_hidden_layers": 1},
    **{"layer_types": ["linear_attention", "full_attention"]},
}


def config(path: Path, speculation: dict[str, Any] | None, **settings: Any) -> VllmConfig:
    """vLLM's configuration, made as a server makes it; the platform has checked it."""
    return EngineArgs(
        str(path), max_model_len=128, speculative_config=speculation, **settings
    ).create_engine_config()


pytestmark = pytest.mark.serve


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    model_stubs.register()


@pytest.fixture
def released(tmp_path: Path) -> Callable[..., Path]:
    """Write a ``config.json`` of a release."""

    def write(model_type: str, architecture: str, **values: Any) -> Path:
        written = SIZES | values | {"model_type": model_type, "architectures": [architecture]}
        (tmp_path / "config.json").write_text(json.dumps(written))
        return tmp_path

    return write


@pytest.mark.parametrize("method", sorted(ours.METHODS.keys() - {"ngram", "mtp"}))
def test_other_methods_are_refused_before_vllm_acts_on_them(demo_path: Path, method: str) -> None:
    """With a model that is nowhere: nothing was read of it, and no package was asked for."""
    given = {"method": method, "num_speculative_tokens": 2, "model": "no/such-model"}
    with pytest.raises(ValueError, match=f"with method {method}: .*; use ngram, or mtp if"):
        config(demo_path, given)


def test_a_method_that_a_flag_of_its_own_names(demo_path: Path) -> None:
    arguments = EngineArgs(str(demo_path), spec_method="eagle3", spec_tokens=2)
    with pytest.raises(ValueError, match="with method eagle3"):
        arguments.create_engine_config()


def test_every_method_of_vllm_is_known() -> None:
    def values(literal: Any) -> set[str]:
        parts = (values(part) if get_args(part) else {part} for part in get_args(literal))
        return set().union(*parts)

    of_families = values(speculative.MTPModelTypes)
    assert values(speculative.SpeculativeMethod) - of_families <= ours.METHODS.keys()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (MTP | {"model": "no/such-model"}, "with the model no/such-model: prediction heads"),
        (MTP | {"revision": "main"}, "with revision main"),
        (MTP | {"draft_sample_method": "probabilistic"}, "draft_sample_method probabilistic"),
        (NGRAM | {"rejection_sample_method": "block"}, "rejection_sample_method block"),
        (
            NGRAM | {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0},
            "rejection_sample_method synthetic",
        ),
        (NGRAM | {"quantization": "awq"}, "quantization awq"),
        (NGRAM | {"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8"),
        (NGRAM | {"max_model_len": 64}, "max_model_len 64"),
        (NGRAM | {"parallel_drafting": True}, "parallel_drafting=True"),
        (NGRAM | {"draft_load_config": {"load_format": "dummy"}}, "draft_load_config="),
        ({"model": "no/such-model", "num_speculative_tokens": 2}, "method draft_model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_that_mean_something_else_are_refused(
    demo_path: Path, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        config(demo_path, given)


@pytest.mark.parametrize("method", [{"method": "mtp"}, {}], ids=["mtp", "no method"])
def test_the_served_checkpoint_may_be_named_by_another_path(
    demo_path: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    link = tmp_path / "link"
    link.symlink_to(demo_path)
    for path in (f"{demo_path}/", str(link)):
        made = config(demo_path, method | {"num_speculative_tokens": 2, "model": path})
        assert ours.read(made) == ours.Speculation("mtp", 2)


def test_a_field_that_a_later_vllm_adds_is_refused_where_it_is_set(demo_path: Path) -> None:
    made = config(demo_path, NGRAM)
    model = made.model_config
    assert ours.refusal(NGRAM | {"tree_of_drafts": False}, model) is None
    refusal = ours.refusal(NGRAM | {"tree_of_drafts": 3}, model)
    assert refusal is not None
    assert "with tree_of_drafts=3" in refusal


def test_a_resolved_configuration_is_checked_too(demo_path: Path) -> None:
    made = config(demo_path, NGRAM)
    assert made.speculative_config is not None
    assert ours.first_refusal(made) is None
    made.speculative_config.rejection_sample_method = "block"
    assert "rejection_sample_method block" in (ours.first_refusal(made) or "")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (NGRAM, ours.Speculation("ngram", 2, 5, 5)),
        (NGRAM | {"prompt_lookup_max": 4}, ours.Speculation("ngram", 2, 4, 4)),
        (
            NGRAM | {"prompt_lookup_min": 2, "prompt_lookup_max": 3},
            ours.Speculation("ngram", 2, 2, 3),
        ),
        ({"model": "[ngram]", "num_speculative_tokens": 7}, ours.Speculation("ngram", 7, 5, 5)),
    ],
    ids=["default", "max", "both", "by model"],
)
def test_ngrams(demo_path: Path, given: dict[str, Any], expected: ours.Speculation) -> None:
    assert ours.read(config(demo_path, given)) == expected


def test_states_are_counted_for_no_more_tokens_than_a_step_has(demo_path: Path) -> None:
    served: Any = SimpleNamespace(heads=None)

    def states(drafts: int) -> int:
        given = NGRAM | {"num_speculative_tokens": drafts}
        made = config(demo_path, given, max_num_batched_tokens=96, max_num_seqs=4)
        return draft_memory.measure(made, served).states

    assert states(2) == 4
    assert states(95) == states(1000) == 97


def test_no_parameter_of_a_request_is_refused_beside_speculation(demo_path: Path) -> None:
    made = config(demo_path, NGRAM)
    arguments = [getattr(made, f"{name}_config") for name in ("model", "speculative")]
    params = SamplingParams(min_p=0.1, logit_bias={3: 1.0})
    params.verify(*arguments, made.structured_outputs_config, None)
    model_stubs.register()  # once more
    params.verify(*arguments, made.structured_outputs_config, None)


RELEASES = {
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", GATED_DELTA),
    "qwen3_next": ("Qwen3NextForCausalLM", GATED_DELTA),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", LATENT),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": 4}),
    "exaone_moe": ("ExaoneMoEForCausalLM", {}),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        LATENT | {"num_layers": 1, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32},
    ),
    "nemotron_h": ("NemotronHForCausalLM", {"hybrid_override_pattern": "M*"}),
    "step3p5": ("Step3p5ForCausalLM", {}),
}


@pytest.mark.parametrize("model_type", RELEASES)
def test_vllm_makes_the_configuration_of_each_familys_heads(
    released: Callable[..., Path], model_type: str
) -> None:
    architecture, values = RELEASES[model_type]
    made = config(released(model_type, architecture, **values), MTP, skip_tokenizer_init=True)
    assert ours.read(made) == ours.Speculation("mtp", 1)
    # vLLM leaves it on for this method.
    assert made.scheduler_config.async_scheduling is False
    assert made.max_concurrent_batches == 1
    assert "async" not in str(made.scheduler_config.scheduler_cls).lower()


@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_heads_on_several_ranks_are_refused(released: Callable[..., Path], size: str) -> None:
    path = released("glm4_moe", "Glm4MoeForCausalLM")
    with pytest.raises(ValueError, match=r"method mtp on several ranks: .*; use ngram"):
        config(path, MTP, skip_tokenizer_init=True, **{size: 2})


def test_the_steps_of_a_pipeline_are_scheduled_one_by_one(demo_path: Path) -> None:
    assert config(demo_path, NGRAM, pipeline_parallel_size=2).max_concurrent_batches == 1
    for kind in ("pipeline", "tensor"):
        made = config(demo_path, None, **{f"{kind}_parallel_size": 2})
        # Some releases leave async scheduling on for pipelines.
        assert made.max_concurrent_batches == (2 if made.scheduler_config.async_scheduling else 1)


@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_moe"])
def test_a_checkpoint_whose_config_names_no_heads(
    released: Callable[..., Path], model_type: str
) -> None:
    architectures = {"glm4_moe": "Glm4MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    path = released(model_type, architectures[model_type], num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=f"no prediction heads in .*model_type {model_type}"):
        config(path, MTP, skip_tokenizer_init=True)


@pytest.mark.parametrize("method", ["deepseek_mtp", "qwen3_next_mtp", "glm4_moe_mtp", "ernie_mtp"])
def test_the_names_that_vllm_gives_the_method_by_family(
    released: Callable[..., Path], method: str
) -> None:
    path = released("glm4_moe", "Glm4MoeForCausalLM")
    made = config(path, MTP | {"method": method}, skip_tokenizer_init=True)
    assert ours.read(made) == ours.Speculation("mtp", 1)


def test_heads_are_not_divided_between_ranks(demo_path: Path) -> None:
    with pytest.raises(ValueError, match="method mtp on several ranks: prediction heads"):
        config(demo_path, MTP, tensor_parallel_size=2)


def test_heads_keep_their_experts_in_memory(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_EXPERT_CACHE", "50%")
    with pytest.raises(ValueError, match="method mtp while experts are on disk"):
        config(demo_path, MTP)
