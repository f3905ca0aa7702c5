"""Every sampling parameter, by its effect."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import models
from support.engine import Greedy, in_process_llm

pytestmark = pytest.mark.serve

PROMPT = "Beautiful is better than"
OTHERS = ["Explicit is", "In the face of ambiguity,", "Now is better", "Errors should"]
# Something where the model has a choice.
LOOSE = "Zen "


@pytest.fixture(scope="module")
def llm(demo_path: Path) -> Iterator[Any]:
    # Few tokens per step: prompts arrive in chunks, beside decodes.
    with in_process_llm(
        demo_path,
        max_num_batched_tokens=24,
        max_logprobs=512,
        # A small model would gladly fill a JSON object with line breaks.
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def unsure(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return an engine of a model with flat distributions, and its reference."""
    path = models.write(tmp_path_factory.mktemp("unsure"), "qwen3", demo_path)
    with in_process_llm(path) as llm:
        yield llm, Greedy(path)


def ids(llm: Any, text: str) -> list[int]:
    return list(llm.get_tokenizer().encode(text, add_special_tokens=False))


def run(llm: Any, prompts: Any, **params: Any) -> list[Any]:
    from vllm import SamplingParams

    params.setdefault("max_tokens", 16)
    outputs = llm.generate(prompts, SamplingParams(**params), use_tqdm=False)
    return [completion for output in outputs for completion in output.outputs]


def tokens(llm: Any, prompt: Any, **params: Any) -> list[int]:
    return list(run(llm, prompt, **params)[0].token_ids)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1, "top_k": 1},
        {"temperature": 1, "top_p": 1e-6},
        {"temperature": 1, "min_p": 1.0},
        {"temperature": 1e-2, "seed": 3},
    ],
    ids=str,
)
def test_what_leaves_one_choice_is_greedy(llm: Any, greedy: Greedy, params: dict[str, Any]) -> None:
    assert tokens(llm, PROMPT, **params) == greedy.tokens(ids(llm, PROMPT), 16)


def test_temperature_spreads_the_choices(llm: Any) -> None:
    drawn = {tuple(tokens(llm, LOOSE, temperature=2.0, max_tokens=4)) for _ in range(8)}
    assert len(drawn) > 2


def test_top_k_and_top_p_keep_to_the_head_of_the_distribution(llm: Any) -> None:
    first = run(llm, LOOSE, temperature=0, max_tokens=1, logprobs=512)[0].logprobs[0]
    ranked = sorted(first, key=lambda token: -first[token].logprob)
    head, mass = set(), 0.0
    for token in ranked:
        head.add(token)
        mass += float(np.exp(first[token].logprob))
        if mass >= 0.6:
            break
    for seed in range(20):
        (token,) = tokens(llm, LOOSE, temperature=1, top_p=0.6, seed=seed, max_tokens=1)
        assert token in head
        (token,) = tokens(llm, LOOSE, temperature=2, top_k=3, seed=seed, max_tokens=1)
        assert token in ranked[:3]


def test_sampling_follows_the_distribution(llm: Any) -> None:
    first = run(llm, LOOSE, temperature=0, max_tokens=1, logprobs=512)[0].logprobs[0]
    drawn = [
        completion.token_ids[0]
        for completion in run(llm, [LOOSE] * 100, temperature=1, max_tokens=1, n=4)
    ]
    best = max(first, key=lambda token: first[token].logprob)
    expected = float(np.exp(first[best].logprob))
    # Four standard deviations of 400 draws.
    slack = 4 * (expected * (1 - expected) / len(drawn)) ** 0.5
    assert abs(drawn.count(best) / len(drawn) - expected) < slack + 1e-3


def repetition(logits: Any, prompt: list[int], output: list[int]) -> Any:
    seen = list({*prompt, *output})
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / 2, logits[seen] * 2)
    return logits


def presence(logits: Any, prompt: list[int], output: list[int]) -> Any:
    logits[list(set(output))] -= 2
    return logits


def frequency(logits: Any, prompt: list[int], output: list[int]) -> Any:
    return logits - 2 * np.bincount(output, minlength=len(logits))


@pytest.mark.parametrize(
    ("params", "penalty"),
    [
        ({"repetition_penalty": 2.0}, repetition),
        ({"presence_penalty": 2.0}, presence),
        ({"frequency_penalty": 2.0}, frequency),
    ],
    ids=["repetition", "presence", "frequency"],
)
def test_penalties_are_the_documented_ones(
    unsure: tuple[Any, Greedy], params: dict[str, float], penalty: Any
) -> None:
    import mlx.core as mx

    llm, greedy = unsure
    prompt, expected = [17 * i % 490 + 5 for i in range(1, 20)], []
    for _ in range(40):
        logits = np.array(greedy.model(mx.array([prompt + expected]))[0, -1], dtype=np.float64)
        expected.append(int(penalty(logits, prompt, expected).argmax()))
    noise = {"prompt_token_ids": prompt}
    assert tokens(llm, noise, temperature=0, max_tokens=40, ignore_eos=True, **params) == expected
    assert expected != greedy.tokens(prompt, 40), "the penalty must change something"


def test_logit_bias_forces_and_forbids(llm: Any) -> None:
    assert tokens(llm, PROMPT, temperature=0, logit_bias={77: 100.0}, max_tokens=5) == [77] * 5
    first = tokens(llm, PROMPT, temperature=0, max_tokens=1)[0]
    assert first not in tokens(llm, PROMPT, temperature=0, logit_bias={first: -100.0})


def reference_logprobs(greedy: Greedy, prompt: list[int]) -> Any:
    import mlx.core as mx

    logits = greedy.model(mx.array([prompt]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def test_logprobs_are_the_models(llm: Any, greedy: Greedy) -> None:
    (completion,) = run(llm, PROMPT, temperature=0, logprobs=5, max_tokens=8)
    sequence = ids(llm, PROMPT) + list(completion.token_ids)
    reference = reference_logprobs(greedy, sequence)
    for i, entry in enumerate(completion.logprobs):
        row = reference[len(sequence) - 8 + i - 1]
        assert set(np.argsort(-row)[:5].tolist()) <= set(entry)
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[token], abs=1e-3)
        assert entry[completion.token_ids[i]].rank == 1


def test_prompt_logprobs_across_chunks(llm: Any, greedy: Greedy) -> None:
    from vllm import SamplingParams

    prompt = ids(
        llm,
        "Errors should never pass silently.\nUnless explicitly silenced.\nIn the face of "
        "ambiguity, refuse the temptation to guess. There should be one",
    )
    assert len(prompt) > 24, "the prompt must not fit one chunk"
    output = llm.generate(
        {"prompt_token_ids": prompt},
        SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3),
        use_tqdm=False,
    )[0]
    reference = reference_logprobs(greedy, prompt)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for i, entry in enumerate(output.prompt_logprobs[1:]):
        assert prompt[i + 1] in entry
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(reference[i][token], abs=1e-3)


def test_n_gives_n_different_answers(llm: Any) -> None:
    answers = [tuple(c.token_ids) for c in run(llm, LOOSE, temperature=1.5, n=3, seed=5)]
    assert len(answers) == 3
    assert len(set(answers)) > 1
    again = [tuple(c.token_ids) for c in run(llm, LOOSE, temperature=1.5, n=3, seed=5)]
    assert answers == again


def test_a_seed_means_the_same_in_any_batch(llm: Any) -> None:
    from vllm import SamplingParams

    seeded = SamplingParams(temperature=1.2, seed=11, max_tokens=20)
    free = SamplingParams(temperature=1.2, max_tokens=20)
    # Long enough to be computed in chunks, which must draw nothing.
    prompt = "Although practicality beats purity, errors should never pass silently, and " + LOOSE
    alone = llm.generate(prompt, seeded, use_tqdm=False)[0].outputs[0].token_ids
    crowd = llm.generate(
        [*OTHERS, prompt, *OTHERS[:3]],
        [free] * 4 + [seeded] + [free] * 3,
        use_tqdm=False,
    )[4]
    assert crowd.outputs[0].token_ids == alone


def test_stop_strings_and_tokens(llm: Any) -> None:
    (plain,) = run(llm, PROMPT, temperature=0, max_tokens=40)
    (stopped,) = run(llm, PROMPT, temperature=0, max_tokens=40, stop=["Simple"])
    assert stopped.text == plain.text[: plain.text.index("Simple")]
    assert stopped.finish_reason == "stop"
    third = plain.token_ids[2]
    (cut,) = run(llm, PROMPT, temperature=0, max_tokens=40, stop_token_ids=[third])
    assert list(cut.token_ids) == list(plain.token_ids[: plain.token_ids.index(third) + 1])


def test_min_tokens_holds_the_stop_back(llm: Any) -> None:
    first = tokens(llm, PROMPT, temperature=0, max_tokens=1)[0]
    early = tokens(llm, PROMPT, temperature=0, stop_token_ids=[first], max_tokens=12)
    assert early == [first]
    late = tokens(llm, PROMPT, temperature=0, stop_token_ids=[first], min_tokens=6, max_tokens=12)
    assert len(late) >= 6
    assert first not in late[:6]


def test_bad_words_are_not_said(llm: Any) -> None:
    assert "Explicit" in run(llm, PROMPT, temperature=0)[0].text
    assert "Explicit" not in run(llm, PROMPT, temperature=0, bad_words=["Explicit"])[0].text


def test_allowed_tokens_are_all_that_is_said(llm: Any) -> None:
    allowed = ids(llm, "abc xyz")
    said = tokens(llm, PROMPT, temperature=1, allowed_token_ids=allowed)
    assert set(said) <= set(allowed)


def test_length_is_kept_and_named(llm: Any) -> None:
    (completion,) = run(llm, PROMPT, temperature=0, max_tokens=7)
    assert len(completion.token_ids) == 7
    assert completion.finish_reason == "length"


def structured(llm: Any, **constraint: Any) -> str:
    from vllm.sampling_params import StructuredOutputsParams

    (completion,) = run(
        llm,
        LOOSE,
        temperature=1,
        seed=1,
        max_tokens=300,
        structured_outputs=StructuredOutputsParams(**constraint),
    )
    assert completion.finish_reason == "stop", completion.text
    return str(completion.text)


def test_guided_json_ends_in_a_valid_object(llm: Any) -> None:
    import jsonschema

    schema = {
        "type": "object",
        "properties": {
            "rule": {"type": "string", "maxLength": 12},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["flat", "nested"]},
        },
        "required": ["rule", "count", "kind"],
        "additionalProperties": False,
    }
    answer = json.loads(structured(llm, json=schema))
    jsonschema.validate(answer, schema)


def test_guided_choice(llm: Any) -> None:
    assert structured(llm, choice=["sparse", "dense"]) in {"sparse", "dense"}


def test_guided_regex(llm: Any) -> None:
    assert re.fullmatch(r"[a-f]{3}-\d{4}", structured(llm, regex=r"[a-f]{3}-\d{4}"))


def test_guided_grammar(llm: Any) -> None:
    text = structured(llm, grammar='root ::= "is " ("better" | "worse") " than " [a-z]{2,5}')
    assert re.fullmatch(r"is (better|worse) than [a-z]{2,5}", text)


def test_guided_and_free_requests_in_one_batch(llm: Any, greedy: Greedy) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    guided = SamplingParams(
        temperature=0,
        max_tokens=50,
        structured_outputs=StructuredOutputsParams(choice=["namespaces", "honking"]),
    )
    free = SamplingParams(temperature=0, max_tokens=16)
    outputs = llm.generate(
        [PROMPT, LOOSE, OTHERS[0], OTHERS[1]], [free, guided, free, guided], use_tqdm=False
    )
    for i, prompt in ((0, PROMPT), (2, OTHERS[0])):
        assert list(outputs[i].outputs[0].token_ids) == greedy.tokens(ids(llm, prompt), 16)
    for i in (1, 3):
        assert outputs[i].outputs[0].text in {"namespaces", "honking"}
