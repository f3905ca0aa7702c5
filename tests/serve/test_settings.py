"""vLLM settings that the backend implements: length, dtype, seed, prefix cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import models
from support.engine import Greedy, engine_core, in_process_llm, worker
from support.server import serve

pytestmark = pytest.mark.serve


def longest_config(path: Path) -> int:
    config = json.loads((path / "config.json").read_text())
    return int(config.get("text_config", config)["max_position_embeddings"])


# --- --max-model-len auto ----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("demo", False), ("demo", True), ("gpt_oss", True), ("deepseek_v3", False)],
)
def test_the_longest_sequence_that_fits_is_served_to_its_end(
    kind: str, prefix: bool, demo_path: Path, tmp_path: Path
) -> None:
    """The length is fitted to a few pages, and a sequence of that length is served."""
    path = demo_path if kind == "demo" else models.write_mlx(tmp_path / "model", kind)
    from vllm import SamplingParams

    with in_process_llm(
        path,
        max_model_len=-1,
        kv_cache_memory_bytes=1 << 20,
        enable_prefix_caching=prefix,
        skip_tokenizer_init=True,
    ) as llm:
        length = llm.llm_engine.model_config.max_model_len
        assert 100 < length < longest_config(path)
        assert worker(llm).runner.sampler.max_model_len == length
        prompt = [5 + i % 40 for i in range(length - 12)]
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        got = list(output.outputs[0].token_ids)
        assert len(got) == 12
        assert got == Greedy(path).tokens(prompt, 12)


def test_a_block_more_than_fits_is_refused(demo_path: Path) -> None:
    """One block is vLLM's null block; a request that needs it would wait for ever."""
    memory = {"kv_cache_memory_bytes": 1 << 20}
    with in_process_llm(demo_path, max_model_len=-1, **memory) as llm:
        longest = llm.llm_engine.model_config.max_model_len
        block = worker(llm).cache_config.block_size
    with (
        pytest.raises(ValueError, match=r"max.model.len"),
        in_process_llm(demo_path, max_model_len=longest + block, **memory),
    ):
        pass


def test_with_enough_memory_auto_is_the_models_own_length(demo_path: Path) -> None:
    with in_process_llm(demo_path, max_model_len=-1) as llm:
        assert llm.llm_engine.model_config.max_model_len == longest_config(demo_path)


# --- --dtype -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_dtype_that_was_asked_for_is_the_dtype_of_weights_and_pages(
    dtype: str, demo_path: Path
) -> None:
    import mlx.core as mx

    from vllm_moe_compat.plan.serving import installed_device

    # The checkpoint is bfloat16; on MLX's CPU backend "auto" means float32.
    wanted = dtype
    if dtype == "auto":
        wanted = "float32" if installed_device() == "cpu" else "bfloat16"
    with in_process_llm(demo_path, dtype=dtype) as llm:
        mine = worker(llm)
        assert str(mine.model_config.dtype) == f"torch.{wanted}"
        softmax = mine.served.model.language_model.model.layers[3].self_attn
        assert softmax.q_proj.weight.dtype == getattr(mx, wanted)
        (pool,) = mine.runner.storage.distinct_pools
        assert pool.pages.dtype.size == getattr(mx, wanted).size
        assert llm.generate("Beautiful", use_tqdm=False)[0].outputs[0].text


# --- --seed ------------------------------------------------------------------


def sampled(path: Path, seed: int) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=2.0, max_tokens=16, ignore_eos=True)
    with in_process_llm(path, seed=seed) as llm:
        outputs = llm.generate(["Now is", "Flat is"], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def test_the_engines_seed_fixes_what_unseeded_requests_draw(demo_path: Path) -> None:
    first, again, other = (sampled(demo_path, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


# --- prefix-cache reset ------------------------------------------------------


def test_after_a_reset_nothing_is_found_in_the_prefix_cache(demo_path: Path) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    # No whole number of blocks: the state at the end of the last is not kept by 0.27.
    prompt = {"prompt_token_ids": [5 + i % 40 for i in range(430)]}
    with in_process_llm(demo_path, enable_prefix_caching=True) as llm:

        def ask() -> tuple[int, list[int]]:
            (output,) = llm.generate(prompt, params, use_tqdm=False)
            return int(output.num_cached_tokens or 0), list(output.outputs[0].token_ids)

        cold, tokens = ask()
        warm, again = ask()
        assert (cold, again) == (0, tokens)
        assert warm > 0
        assert llm.reset_prefix_cache()
        assert ask() == (0, tokens)
        # While a request runs its blocks stay, and vLLM says that it did not reset.
        llm.llm_engine.add_request("running", prompt, params)
        llm.llm_engine.step()
        assert not llm.reset_prefix_cache()
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        # Unless it is told to preempt them: they begin anew and end the same.
        llm.llm_engine.add_request("preempted", prompt, params)
        llm.llm_engine.step()
        assert llm.reset_prefix_cache(reset_running_requests=True)
        ended: list[Any] = []
        while llm.llm_engine.has_unfinished_requests():
            ended += [output for output in llm.llm_engine.step() if output.finished]
        assert list(ended[-1].outputs[0].token_ids) == tokens
        pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


# --- over HTTP ---------------------------------------------------------------


@pytest.mark.full
def test_the_server_knows_the_fitted_length_and_resets_its_cache(
    demo_path: Path, tmp_path: Path
) -> None:
    arguments = ("--max-model-len", "auto", "--kv-cache-memory-bytes", str(1 << 20))
    with serve(
        demo_path,
        tmp_path / "log",
        *arguments,
        "--enable-prefix-caching",
        env={"VLLM_SERVER_DEV_MODE": "1"},
    ) as server:
        (model,) = server.request("/v1/models")["data"]
        assert 100 < model["max_model_len"] < longest_config(demo_path)
        body = {
            "model": "demo",
            "prompt": [5 + i % 40 for i in range(300)],
            "max_tokens": 2,
            "temperature": 0,
        }
        texts = [server.request("/v1/completions", body)["choices"][0]["text"] for _ in range(2)]
        hits = server.metric("vllm:prefix_cache_hits_total")
        assert hits > 0
        server.request("/reset_prefix_cache", {})
        texts.append(server.request("/v1/completions", body)["choices"][0]["text"])
        assert server.metric("vllm:prefix_cache_hits_total") == hits
        assert len(set(texts)) == 1
