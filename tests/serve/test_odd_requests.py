"""A request that cannot be computed ends alone; the others get exactly their answers."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import models, odd_requests
from support.engine import Greedy, engine_core, in_process_llm, worker
from support.odd_requests import ANSWERED, BEYOND, ENDED, NAN, REFUSED, ROWS

pytestmark = pytest.mark.serve

SETTINGS: dict[str, dict[str, Any]] = {
    "prefix": {"enable_prefix_caching": True, "max_num_batched_tokens": 64},
    "async": {"async_scheduling": True, "enable_prefix_caching": True},
    "starved": {
        "async_scheduling": True,
        "num_gpu_blocks_override": 14,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 6,
    },
    "drafts": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 2,
        },
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 64,
    },
}
COMMON = {"max_model_len": 128, "max_logprobs": 10 * ROWS, "kv_cache_memory_bytes": 4 << 20}


@pytest.fixture(scope="module")
def checkpoint(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_requests.write(tmp_path_factory.mktemp("odd") / "model", demo_path)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Greedy:
    return Greedy(checkpoint)


@pytest.fixture(scope="module")
def started(checkpoint: Path) -> Iterator[tuple[Any, list[str]]]:
    """An engine, and what the package logs at its start."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("vllm_moe_compat")
    logger.addHandler(handler)
    try:
        with in_process_llm(checkpoint, **COMMON, **SETTINGS["prefix"]) as llm:
            yield llm, [record.getMessage() for record in records]
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def llm(started: tuple[Any, list[str]]) -> Any:
    return started[0]


def test_a_tokenizer_larger_than_the_model_is_one_warning(started: tuple[Any, list[str]]) -> None:
    (warning,) = started[1]
    assert f"ids up to {BEYOND} and the model's embeddings have {ROWS} rows" in warning
    assert "'<mine>'" in warning


def play(llm: Any, requests: dict[str, tuple[list[int], Any]], gaps: list[int]) -> dict[str, Any]:
    """Send the requests, ``gaps[i]`` steps after one another; return outputs or refusals."""
    from vllm.exceptions import VLLMValidationError

    engine = llm.llm_engine
    found: dict[str, Any] = {}
    waiting, step, due = list(requests.items()), 0, 0
    while waiting or engine.has_unfinished_requests():
        assert step < 2000, f"no end: {set(requests) - set(found)}"
        while waiting and step >= due:
            name, (prompt, params) = waiting.pop(0)
            try:
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
            except (ValueError, VLLMValidationError) as refusal:
                found[name] = refusal
            due = step + gaps[len(waiting) % len(gaps)]
        for output in engine.step():
            if output.finished:
                found[output.request_id] = output
        step += 1
    return found


def good(draw: random.Random) -> tuple[list[int], Any]:
    """Return a request with one right answer, drawn in MLX or by vLLM's sampler."""
    prompt = [draw.choice(odd_requests.PLAIN) for _ in range(draw.choice([2, 17, 50]))]
    ways: list[dict[str, Any]] = [{}, {"logprobs": 1}, {"min_tokens": 3}]
    return prompt, odd_requests.with_params(temperature=0, max_tokens=12, **draw.choice(ways))


def assert_quiet(llm: Any, known: set[str]) -> None:
    """Nothing of an ended request is left."""
    llm.llm_engine.step()
    pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    runner = worker(llm).runner
    assert not runner.batch.requests
    assert not runner.sampler.failed.among(known)


def check(llm: Any, reference: Greedy, odd: dict[str, odd_requests.Kind], seed: int) -> None:
    draw = random.Random(seed)
    requests: dict[str, tuple[list[int], Any]] = {}
    for name, kind in odd.items():
        requests[f"good before {name}"] = good(draw)
        requests[name] = kind(draw)
    requests["good at the end"] = good(draw)
    found = play(llm, requests, [draw.choice([0, 0, 1, 3]) for _ in range(5)])
    for name, (prompt, params) in requests.items():
        result = found[name]
        if name.startswith("good"):
            tokens = list(result.outputs[0].token_ids)
            assert tokens == reference.tokens(prompt, params.max_tokens), (seed, name)
        elif name in REFUSED:
            assert isinstance(result, Exception), (seed, name, result)
        elif name in ENDED:
            (answer,) = result.outputs
            assert answer.finish_reason == "error", (seed, name, answer)
            assert "logits" in answer.stop_reason or "no token is left" in answer.stop_reason
        else:
            (answer,) = result.outputs
            assert answer.finish_reason == "length", (seed, name, answer)
            assert len(answer.token_ids) == params.max_tokens
    assert_quiet(llm, set(found))


@pytest.mark.parametrize("odd", [REFUSED, ENDED, ANSWERED], ids=["refused", "ended", "answered"])
def test_every_kind_beside_good_requests(
    llm: Any, reference: Greedy, odd: dict[str, odd_requests.Kind]
) -> None:
    check(llm, reference, odd, seed=1)


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.full) for name in ("async", "drafts")), "starved"],
)
def test_random_mixtures(
    name: str,
    checkpoint: Path,
    reference: Greedy,
    schedule_budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_MOE_COMPAT_PARK_DRAFTS", "0")
    kinds = REFUSED | ENDED | ANSWERED
    with in_process_llm(checkpoint, **COMMON, **SETTINGS[name]) as llm:
        for seed in range(schedule_budget):
            draw = random.Random(seed)
            names = draw.sample(list(ENDED), 4) + draw.sample(list(kinds), 6)
            draw.shuffle(names)
            check(llm, reference, {one: kinds[one] for one in names}, seed)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "deepseek_v3", "qwen3_next", "jamba"])
def test_other_layers(kind: str, tmp_path: Path, schedule_budget: int) -> None:
    """Windows and sinks, one sequence at a time, latents, and two kinds of states."""
    path = models.write_mlx(tmp_path / "model", kind)
    odd_requests.spoil(path)
    without_text = {"a grammar without a token", "a word without a row is forbidden"}
    kinds = {name: one for name, one in (ENDED | ANSWERED).items() if name not in without_text}
    settings = COMMON | SETTINGS["async"] | {"skip_tokenizer_init": True}
    settings |= {"max_num_batched_tokens": 64}
    reference = Greedy(path)
    with in_process_llm(path, **settings) as llm:
        for seed in range(schedule_budget):
            check(llm, reference, kinds, seed)


def test_a_refusal_names_id_and_rows(llm: Any) -> None:
    for prompt in ("Beautiful <mine>", {"prompt_token_ids": [7, BEYOND]}):
        with pytest.raises(ValueError, match=f"id {BEYOND}, .* {ROWS} rows, for ids 0 to 511"):
            llm.generate(prompt, use_tqdm=False)


def without_front_end(llm: Any, name: str, prompt: list[int], **params: Any) -> Any:
    """An ``EngineCoreRequest`` that was changed after the front end's checks."""
    engine = llm.llm_engine
    inputs = {"type": "token", "prompt_token_ids": [7] * len(prompt)}
    made = engine.input_processor.process_inputs(
        name, inputs, odd_requests.with_params(temperature=0), supported_tasks=("generate",)
    )
    made.prompt_token_ids = prompt
    made.sampling_params.detokenize = False
    for key, value in params.items():
        setattr(made.sampling_params, key, value)
    return made


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ([7, BEYOND], {}, f"id {BEYOND}, and the model's embeddings have {ROWS} rows"),
        ([7, -1], {}, "id -1, and"),
        ([7] * 70 + [2**40], {}, f"id {2**40}, and"),
        ([7, 8], {"allowed_token_ids": [BEYOND]}, f"allowed_token_ids has token id {BEYOND}"),
        ([7, 8], {"prompt_logprobs": ROWS + 1}, "prompt_logprobs is 513"),
        ([7, 8], {"temperature": 1.0, "seed": 2**64}, "seed is"),
        ([7, 8], {"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_what_reaches_the_worker_anyway_ends_alone(
    llm: Any, reference: Greedy, prompt: list[int], params: dict[str, Any], reason: str
) -> None:
    engine = llm.llm_engine
    sound = [9, 10, 11] * 9
    engine.add_request(
        "good", {"prompt_token_ids": sound}, odd_requests.with_params(temperature=0, max_tokens=12)
    )
    engine.add_request("odd", without_front_end(llm, "odd", prompt, **params), None)
    found = play(llm, {}, [0])
    assert list(found["good"].outputs[0].token_ids) == reference.tokens(sound, 12)
    (answer,) = found["odd"].outputs
    assert answer.finish_reason == "error"
    assert reason in answer.stop_reason
    assert_quiet(llm, set(found))


def test_pages_of_a_failed_request_are_not_found_again(llm: Any) -> None:
    pool = engine_core(llm).scheduler.kv_cache_manager.block_pool

    def cached() -> int:
        return sum(block.block_hash is not None for block in pool.blocks)

    def end_of(prompt: list[int], **params: Any) -> str:
        assert llm.reset_prefix_cache()
        request = prompt, odd_requests.with_params(**params)
        return str(play(llm, {"odd": request}, [0])["odd"].outputs[0].finish_reason)

    assert end_of([7] * 40 + [NAN] + [8] * 60, temperature=0) == "error"
    assert not cached()
    assert end_of([7] * 40 + [8] * 60, allowed_token_ids=[NAN]) == "error"
    assert not cached()
    # A dead end taints nothing.
    only = {"allowed_token_ids": [77], "stop_token_ids": [77], "min_tokens": 2}
    assert end_of([9] * 100, **only) == "error"
    assert cached() == 6


def test_a_processor_that_raises_for_one_request_ends_that_one(
    checkpoint: Path, reference: Greedy
) -> None:
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class Picky(LogitsProcessor):
        """Raises for some requests, as it takes them in or as it is applied."""

        def __init__(self, *_: Any) -> None:
            self.raising = False

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            for _, params, _, _ in batch_update.added if batch_update else ():
                wish = (params.extra_args or {}).get("raise")
                if wish == "update":
                    raise KeyError("not in the update")
                self.raising |= wish == "apply"

        def apply(self, logits: Any) -> Any:
            if self.raising:
                raise IndexError("not while applied")
            return logits

    settings = COMMON | {"logits_processors": [Picky]}
    with in_process_llm(checkpoint, **settings) as llm:
        draw = random.Random(3)
        seeded = odd_requests.with_params(temperature=1, seed=4, logprobs=1)
        requests = {f"good {number}": good(draw) for number in range(3)}
        requests |= {f"seeded {number}": ([20 + number] * 5, seeded) for number in range(2)}
        quiet = play(llm, requests, [0, 1])
        odd = {
            wish: ([7, 8], odd_requests.with_params(extra_args={"raise": wish}))
            for wish in ("update", "apply")
        }
        mixed = [*requests.items()]
        mixed[2:2], mixed[5:5] = [("update", odd["update"])], [("apply", odd["apply"])]
        found = play(llm, dict(mixed), [0, 1])
        for name, (prompt, params) in requests.items():
            tokens = list(found[name].outputs[0].token_ids)
            assert tokens == list(quiet[name].outputs[0].token_ids)
            if name.startswith("good"):
                assert tokens == reference.tokens(prompt, params.max_tokens)
            else:
                assert [
                    {token: entry.logprob for token, entry in step.items()}
                    for step in found[name].outputs[0].logprobs
                ] == [
                    {token: pytest.approx(entry.logprob, abs=1e-4) for token, entry in step.items()}
                    for step in quiet[name].outputs[0].logprobs
                ]
        for wish, error in (("update", "KeyError"), ("apply", "IndexError")):
            (answer,) = found[wish].outputs
            assert answer.finish_reason == "error"
            assert error in answer.stop_reason
        assert_quiet(llm, set(found))


def test_head_and_embeddings_of_different_size(checkpoint: Path, reference: Greedy) -> None:
    from vllm_moe_compat.backend.model import token_rows
    from vllm_moe_compat.backend.vllm.runner import ModelRunner
    from vllm_moe_compat.backend.vllm.sampling import TokenSampler

    few = ROWS - 32
    only = {"allowed_token_ids": [few + 5]}
    sound = [9, 10, 11] * 9
    for shortened in ("embed_tokens", "lm_head"):
        with in_process_llm(checkpoint, **COMMON, async_scheduling=True) as llm:
            own = worker(llm)
            model = own.served.model
            part = model.model.embed_tokens if shortened == "embed_tokens" else model.lm_head
            part.weight = part.weight[:few]
            rows = token_rows.of_model(model)
            assert (rows.embedding, rows.head) == (
                (few, ROWS) if shortened == "embed_tokens" else (ROWS, few)
            )
            storage = own.runner.storage
            own.runner.close()
            own.runner = ModelRunner(model, storage, TokenSampler(own.vllm_config, rows))
            requests = {
                "good": (sound, odd_requests.with_params(temperature=0, max_tokens=12)),
                "odd": ([7], odd_requests.with_params(**only)),
                "one token": ([7], odd_requests.with_params(**only, max_tokens=1)),
                "sampled": ([7], odd_requests.with_params(temperature=1)),
                "on the host": ([7], odd_requests.with_params(seed=1, logprobs=-1)),
            }
            found = play(llm, requests, [0])
            (odd,), (one,) = found["odd"].outputs, found["one token"].outputs
            if shortened == "embed_tokens":
                assert odd.finish_reason == "error"
                assert f"token {few + 5}, and the model's embeddings have {few}" in odd.stop_reason
                assert list(odd.token_ids) == list(one.token_ids) == [few + 5]
                assert one.finish_reason == "length"
            else:
                assert odd.finish_reason == one.finish_reason == "error"
                assert f"id {few + 5}, and the model's head has {few} rows" in one.stop_reason
                want = reference.tokens(sound, 12)
                assert max(want) < few, "else the shortened head cannot give them"
                assert list(found["good"].outputs[0].token_ids) == want
                for name in ("sampled", "on the host"):
                    assert max(found[name].outputs[0].token_ids) < few
            assert_quiet(llm, set(found))
