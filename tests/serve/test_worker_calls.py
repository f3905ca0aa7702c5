"""Whatever vLLM asks of a worker outside a step, the engine stays alive and exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import models, worker_calls
from support.engine import engine_core, in_process_llm, worker

pytestmark = pytest.mark.serve

PROMPT = list(range(20, 90))
NOT_SUPPORTED = r"^The embedded MLX backend does not support [^.]+\.$"
START_UP = r"^\w+ is a step of the start-up, which is over; start another server\.$"
WITH_THE_ENGINE = r"^A worker sleeps, or discards pages, only with vLLM's engine"
UNKNOWN = "is not implemented"
NOBODYS = "nobody_knows_this_name"


class Refused(str):
    """The pattern of a refusal; any other value in the table is the answer of the call."""


TABLE: dict[str, tuple[dict[str, Any], Any]] = {
    # name: (keyword arguments, answer or refusal)
    "add_lora": ({"lora_request": None}, Refused(NOT_SUPPORTED)),
    "remove_lora": ({"lora_id": 1}, False),
    "pin_lora": ({"lora_id": 1}, Refused(NOT_SUPPORTED)),
    "list_loras": ({}, set()),
    "check_health": ({}, None),
    "synchronize_device": ({}, None),
    "reset_mm_cache": ({}, None),
    "reset_encoder_cache": ({}, None),
    "release_late_interaction_query_cache": ({"query_keys": ["a"]}, None),
    "execute_dummy_batch": ({}, None),
    "take_draft_token_ids": ({}, None),
    "get_draft_model": ({}, None),
    "supports_draft_weight_updates": ({}, False),
    "get_supported_tasks": ({}, ("generate",)),
    "get_kv_connector_handshake_metadata": ({}, None),
    "get_compilation_match_table": ({}, {}),
    "get_encoder_timing_stats": ({}, {}),
    "get_supported_kv_cache_layouts": ({}, ["LBNHC"]),
    "set_kv_cache_layout": ({"kv_cache_layout": "LBNHC"}, None),
    # sleep and weights
    "sleep": ({"level": 1}, Refused(WITH_THE_ENGINE)),
    "discard": ({"tags": ("kv_cache",)}, Refused(WITH_THE_ENGINE)),
    "wake_up": ({"tags": ["kv_cache"]}, None),
    "reload_weights": ({}, None),
    "reset_weights": ({}, Refused(NOT_SUPPORTED)),
    "init_weight_transfer_engine": ({"init_info": {}}, Refused(NOT_SUPPORTED)),
    "shutdown_weight_transfer_engine": ({}, None),
    "start_weight_update": ({}, Refused(NOT_SUPPORTED)),
    "start_draft_weight_update": ({}, Refused(NOT_SUPPORTED)),
    "update_weights": ({"update_info": {}}, Refused(NOT_SUPPORTED)),
    "finish_weight_update": ({}, Refused(NOT_SUPPORTED)),
    "update_config": ({"overrides": {"load_config": {}}}, Refused(NOT_SUPPORTED)),
    "save_sharded_state": ({"path": "/nowhere"}, Refused(NOT_SUPPORTED)),
    "save_tensorized_model": ({"tensorizer_config": None}, Refused(NOT_SUPPORTED)),
    "profile": ({"is_start": True, "delay_iterations": 1}, Refused(NOT_SUPPORTED)),
    "elastic_ep_execute": ({"execute_method": "load_model"}, Refused(NOT_SUPPORTED)),
    "handle_ft_command": ({"ft_request": None}, Refused(NOT_SUPPORTED)),
    "checkpoint_prepare": ({}, Refused(NOT_SUPPORTED)),
    "checkpoint_restore": ({}, Refused(NOT_SUPPORTED)),
    # the start-up, which would replace pages that hold prefixes
    "init_device": ({}, Refused(START_UP)),
    "load_model": ({}, Refused(START_UP)),
    "determine_available_memory": ({}, Refused(START_UP)),
    "initialize_from_config": ({"kv_cache_configs": [None]}, Refused(START_UP)),
    "compile_or_warm_up_model": ({}, Refused(START_UP)),
    "update_max_model_len": ({"max_model_len": 64}, Refused(START_UP)),
    # of executors that the platform does not allow
    "adjust_rank": ({}, Refused(UNKNOWN)),
    "init_worker": ({"all_kwargs": []}, Refused("list index out of range")),
    "reinitialize_distributed": ({}, Refused(UNKNOWN)),
    "update_environment_variables": ({"envs_list": [{}]}, None),
    NOBODYS: ({}, Refused(UNKNOWN)),
}
ASKED_ELSEWHERE = {
    # the steps themselves
    *("execute_model", "sample_tokens", "annotate_profile"),
    # answers that the tests below look into
    *("get_model", "apply_model", "get_model_inspection", "compute_weight_checksums"),
    *("get_cache_block_size_bytes", "get_kv_cache_spec", "vocab_size", "shutdown"),
    # properties of vLLM's GPU worker, for itself
    *("sleep_mode_backend", "randomize_dummy_inputs"),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = models.write_mlx(tmp_path_factory.mktemp("calls") / "model", "qwen3_moe")
    with in_process_llm(path, skip_tokenizer_init=True, enable_prefix_caching=True) as llm:
        yield llm


def ask(llm: Any) -> tuple[int, list[int], float]:
    """Cached tokens, the answer, and its log-probability, which shows more than the answer."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=6, detokenize=False, ignore_eos=True, logprobs=0
    )
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    answer = output.outputs[0]
    return output.num_cached_tokens or 0, list(answer.token_ids), answer.cumulative_logprob


def test_the_tables_name_every_method_of_this_vllm() -> None:
    assert worker_calls.worker_methods() - TABLE.keys() - ASKED_ELSEWHERE == set()


@pytest.mark.parametrize("name", sorted(TABLE.keys() & (worker_calls.worker_methods() | {NOBODYS})))
def test_a_call_leaves_the_engine_alive_and_exact(llm: Any, name: str) -> None:
    ask(llm)
    before = ask(llm)
    assert before[0] > 0, "the prompt's pages must be there before the call"
    kwargs, expected = TABLE[name]
    if isinstance(expected, Refused):
        with pytest.raises(Exception, match=expected):
            llm.collective_rpc(name, kwargs=kwargs)
    else:
        assert llm.collective_rpc(name, kwargs=kwargs) == [expected]
    assert ask(llm) == before


def test_a_function_that_fails(llm: Any) -> None:
    def fail(self: Any) -> None:
        raise KeyError("mine")

    before = ask(llm)[1:]
    with pytest.raises(KeyError, match="mine"):
        llm.collective_rpc(fail)
    assert ask(llm)[1:] == before


def test_a_step_that_vllm_did_not_schedule(llm: Any) -> None:
    before = ask(llm)[1:]
    with pytest.raises(AttributeError):
        llm.collective_rpc("execute_model", args=(None,))
    # vLLM asks for the tokens of a step that failed, too; the reason is told once.
    with pytest.raises(AttributeError):
        llm.collective_rpc("sample_tokens", args=(None,))
    with pytest.raises(AssertionError, match="sample_tokens before execute_model"):
        llm.collective_rpc("sample_tokens", args=(None,))
    assert ask(llm)[1:] == before


def test_answers_about_the_model(llm: Any) -> None:
    mine = worker(llm)
    (kind,) = llm.apply_model(lambda model: type(model).__module__)
    assert kind == "mlx_lm.models.qwen3_moe"
    assert "SwitchGLU" in llm.collective_rpc("get_model_inspection")[0]
    assert "SwitchGLU" in repr(llm)
    assert mine.vocab_size == 512
    (specs,) = llm.collective_rpc("get_kv_cache_spec")
    (size,) = llm.collective_rpc("get_cache_block_size_bytes")
    assert size == sum(spec.page_size_bytes for spec in specs.values())


def test_checksums_tell_weights_apart(llm: Any) -> None:
    import mlx.core as mx

    name = "model.norm.weight"
    (before,) = llm.collective_rpc("compute_weight_checksums")
    assert len(set(before.values())) > 10
    norm = worker(llm).get_model().model.norm
    kept = norm.weight
    norm.weight = kept + mx.array(1e-3)
    (changed,) = llm.collective_rpc("compute_weight_checksums")
    norm.weight = kept
    assert {key for key in before if before[key] != changed[key]} == {name}
    assert llm.collective_rpc("compute_weight_checksums") == [before]


ENGINE: dict[str, tuple[Callable[[Any], Any], Any]] = {
    # a method of vLLM's EngineCore: (call, answer or refusal)
    "profile": (lambda core: core.profile(True), Refused(NOT_SUPPORTED)),
    "reset_mm_cache": (lambda core: core.reset_mm_cache(), None),
    "reset_encoder_cache": (lambda core: core.reset_encoder_cache(), None),
    "reset_prefix_cache": (lambda core: core.reset_prefix_cache(), True),
    "pause_scheduler": (lambda core: core.pause_scheduler("abort"), None),
    "is_scheduler_paused": (lambda core: core.is_scheduler_paused(), False),
    "sleep": (lambda core: core.sleep(1), Refused("--enable-sleep-mode")),
    "wake_up": (lambda core: core.wake_up(), ...),
    "is_sleeping": (lambda core: core.is_sleeping(), False),
    "release_kv_cache_memory": (
        lambda core: core.release_kv_cache_memory(),
        Refused("requires a completed pause"),
    ),
    "execute_dummy_batch": (lambda core: core.execute_dummy_batch(), None),
    "compute_weight_checksums": (lambda core: len(core.compute_weight_checksums()), 1),
    "add_lora": (
        lambda core: core.add_lora(SimpleNamespace(lora_int_id=1)),
        Refused(NOT_SUPPORTED),
    ),
    "remove_lora": (lambda core: core.remove_lora(1), False),
    "list_loras": (lambda core: core.list_loras(), set()),
    "pin_lora": (lambda core: core.pin_lora(1), Refused(NOT_SUPPORTED)),
    "save_sharded_state": (lambda core: core.save_sharded_state("x"), Refused(NOT_SUPPORTED)),
    "collective_rpc": (lambda core: core.collective_rpc("check_health"), [None]),
    "set_weight_version": (lambda core: core.set_weight_version("2"), None),
    "get_weight_version": (lambda core: type(core.get_weight_version()), str),
    "get_supported_tasks": (lambda core: core.get_supported_tasks(), ...),
    "get_kv_cache_group_metadata": (lambda core: len(core.get_kv_cache_group_metadata()), 1),
    "resume_scheduler": (lambda core: core.resume_scheduler(), None),
}
ENGINE_ITSELF = {
    # requests and steps, which all other tests exercise
    *("add_request", "abort_requests", "preprocess_add_request", "step", "post_step"),
    *("step_with_batch_queue", "shutdown", "log_error_detail", "log_iteration_details"),
    *("capture_iteration_details",),
}


def engine_methods() -> set[str]:
    return worker_calls.methods("v1/engine/core.py", "EngineCore")


def test_the_table_names_every_method_of_vllms_engine() -> None:
    assert engine_methods() - ENGINE.keys() - ENGINE_ITSELF == set()


@pytest.mark.parametrize("name", sorted(ENGINE.keys() & engine_methods()))
def test_an_engine_call_leaves_it_alive_and_exact(llm: Any, name: str) -> None:
    before = ask(llm)[1:]
    call, expected = ENGINE[name]
    core = engine_core(llm)
    if isinstance(expected, Refused):
        with pytest.raises(Exception, match=expected):
            call(core)
    else:
        answer = call(core)
        assert expected is ... or answer == expected
        core.resume_scheduler()
    assert ask(llm)[1:] == before


def test_a_worker_that_was_shut_down_says_so(tmp_path: Path) -> None:
    path = models.write_mlx(tmp_path / "model", "qwen3_moe")
    with in_process_llm(path, skip_tokenizer_init=True) as llm:
        ask(llm)
        llm.collective_rpc("shutdown")
        llm.collective_rpc("shutdown")
        with pytest.raises(ValueError, match="was shut down; start another server"):
            ask(llm)
