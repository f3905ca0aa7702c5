"""Requests that nobody can compute, and a checkpoint on which some of them fail inside.

The checkpoint has a token whose row is NaN, one whose row is infinite, and a tokenizer with a token
more than the model. Token 0, with which passes could be padded, is NaN too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import models

ROWS = 512
ZERO, NAN, INFINITE, BEYOND = 0, 300, 301, ROWS
PLAIN = range(5, 290)  # sound tokens


def write(path: Path, tokenizer_from: Path) -> Path:
    """Write the checkpoint into ``path``."""
    from transformers import AutoTokenizer

    models.write(path, "qwen3_moe", tokenizer_from, dtype="float32")
    spoil(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) <= ROWS
    tokenizer.add_tokens([f"<filler{i}>" for i in range(ROWS - len(tokenizer))])
    tokenizer.add_tokens(["<mine>"], special_tokens=True)
    assert tokenizer("<mine>", add_special_tokens=False)["input_ids"] == [BEYOND]
    tokenizer.save_pretrained(path)
    return path


def spoil(path: Path) -> None:
    """Make three rows of the embeddings of a checkpoint of one shard NaN or infinite."""
    import torch
    from safetensors.torch import load_file, save_file

    (shard,) = path.glob("model*.safetensors")
    tensors = load_file(shard)
    (embeddings,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
    tensors[embeddings][[ZERO, NAN]] = torch.nan
    tensors[embeddings][INFINITE, 3] = torch.inf
    # Seldom drawn by others.
    tensors[head][[ZERO, NAN, INFINITE]] = 0
    save_file(tensors, shard, metadata={"format": "pt"})


def with_params(**values: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**({"ignore_eos": True, "max_tokens": 6, "detokenize": False} | values))


def _prompt(draw: random.Random, *inside: int) -> list[int]:
    """Return sound tokens around ``inside``, short or longer than a block and a chunk."""
    before, after = ([draw.choice(PLAIN) for _ in range(draw.choice([1, 3, 40]))] for _ in range(2))
    return before + list(inside) + after


def _one_way(draw: random.Random) -> Any:
    """Return parameters by which tokens are drawn in one of the ways that the backend has."""
    return with_params(
        **draw.choice(
            [
                {"temperature": 0},
                {"temperature": 1},
                {"temperature": 1, "top_k": 3},
                {"temperature": 1, "top_p": 0.5},
                {"temperature": 1, "seed": 3},
                {"temperature": 0, "logprobs": 2},
                {"temperature": 0, "prompt_logprobs": 2},
                {"temperature": 1, "n": 2},
            ]
        )
    )


def _grammar(draw: random.Random) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    # Token 77 begins no such text.
    only = StructuredOutputsParams(regex="\N{SNOWMAN}+")
    return with_params(structured_outputs=only, allowed_token_ids=[77])


def _stops(draw: random.Random) -> Any:
    every = list(range(ROWS))
    return with_params(temperature=0, min_tokens=3, stop_token_ids=every)


Kind = Callable[[random.Random], tuple[list[int], Any]]


def _kind(prompt: Callable[[random.Random], list[int]], **params: Any) -> Kind:
    return lambda draw: (prompt(draw), with_params(**params) if params else _one_way(draw))


# Refused by the front end: name → the request.
REFUSED: dict[str, Kind] = {
    "a token without a row": _kind(lambda draw: _prompt(draw, BEYOND)),
    "a negative token": _kind(lambda draw: _prompt(draw, -1)),
    "a huge token": _kind(lambda draw: _prompt(draw, 2**70)),
    "allowed without a row": _kind(_prompt, allowed_token_ids=[7, BEYOND]),
    "a bias without a row": _kind(_prompt, logit_bias={BEYOND: 1.0}),
    "a stop without a row": _kind(_prompt, stop_token_ids=[BEYOND], min_tokens=2),
    "an infinite bias": _kind(_prompt, logit_bias={7: math.inf}),
    "a bias beyond float32": _kind(_prompt, logit_bias={7: 1e300}),
    "a penalty beyond float32": _kind(_prompt, repetition_penalty=1e300),
    "more logprobs than tokens": _kind(_prompt, logprobs=ROWS + 1),
    "more prompt_logprobs than tokens": _kind(_prompt, prompt_logprobs=ROWS + 1),
    "a seed of 70 bits": _kind(_prompt, seed=2**70),
    "a length of 70 bits": _kind(_prompt, max_tokens=2**70),
    "no prompt": _kind(lambda draw: []),
}
# Ended by an error, after they began.
ENDED: dict[str, Kind] = {
    "NaN in the prompt": _kind(lambda draw: _prompt(draw, NAN)),
    "NaN at the end of the prompt": _kind(lambda draw: [*_prompt(draw)[:45], NAN]),
    "infinity in the prompt": _kind(lambda draw: _prompt(draw, INFINITE)),
    "only a token that comes too early": _kind(
        _prompt, allowed_token_ids=[77], stop_token_ids=[77], min_tokens=2
    ),
    "NaN forced": _kind(_prompt, allowed_token_ids=[NAN]),
    "all tokens stop too early": lambda draw: (_prompt(draw), _stops(draw)),
    "a grammar without a token": lambda draw: (_prompt(draw), _grammar(draw)),
    "a bias that overflows": _kind(
        _prompt, temperature=0.5, logit_bias={7: 3.3e38}, repetition_penalty=1e-30
    ),
}
# Odd, and answered.
ANSWERED: dict[str, Kind] = {
    "a word without a row is forbidden": _kind(_prompt, bad_words=["<mine>"], temperature=0),
    "k of 40 bits": _kind(_prompt, top_k=2**40),
    "k of 40 bits, seeded": _kind(_prompt, top_k=2**40, seed=1),
    "p below float32": _kind(_prompt, top_p=1e-320),
    "a temperature near nothing": _kind(_prompt, temperature=1e-300, seed=1),
    "all logprobs": _kind(_prompt, logprobs=-1, prompt_logprobs=-1),
    "the largest seed": _kind(_prompt, seed=2**64 - 1),
    "a forced token": _kind(_prompt, logit_bias={7: 3e38}),
}
