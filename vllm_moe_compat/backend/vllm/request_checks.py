"""What makes a request impossible to compute, seen before it is computed.

The front end asks for every request (``MlxPlatform.validate_request``) and refuses it with the
sentence. vLLM checks ids against the larger of tokenizer and config, and not all parameters; a
value that it lets pass would be an index beyond an array, or an exception in a step of all
requests. The worker asks again, since requests may arrive without a front end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vllm_moe_compat.backend.model.rows import TokenRows

# Parameters that name token ids, all of which index the logits.
_ID_LISTS = ("allowed_token_ids", "stop_token_ids", "logprob_token_ids", "trace_decode_token_ids")
_COUNTS = ("logprobs", "prompt_logprobs")
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
_INT64 = range(-(2**63), 2**63)
_SEEDS = range(-(2**63), 2**64)


def first_fault(prompt: Sequence[int], params: Any, rows: TokenRows) -> str | None:
    """Return the first reason why a request cannot be computed, or None.

    Args:
        prompt: token ids.
        params: ``vllm.SamplingParams``.
        rows: those of the model.
    """
    return next(_faults(prompt, params, rows), None)


def _faults(prompt: Sequence[int], params: Any, rows: TokenRows) -> Iterator[str]:
    if prompt and (min(prompt) < 0 or max(prompt) >= rows.embedding):
        wrong = _outside(prompt, rows.embedding)
        yield (
            f"The prompt has token id {wrong}, and the model's embeddings have {rows.embedding} "
            f"rows, for ids 0 to {rows.embedding - 1}; leave the token out, or use the tokenizer "
            "that the model was trained with."
        )
    for name in _ID_LISTS:
        yield from _id_faults(name, getattr(params, name, None) or (), rows)
    bias = params.logit_bias or {}
    yield from _id_faults("logit_bias", bias, rows)
    for token, value in bias.items():
        if not abs(value) <= _LARGEST_FLOAT32:
            yield (
                f"logit_bias has {value} for token id {token}, which is no finite float32; use a "
                "value from -100 to 100."
            )
    yield from _number_faults(params)
    for name in _COUNTS:
        count = getattr(params, name)
        if count is not None and count > rows.head:
            yield f"{name} is {count}, and the model has {rows.head} tokens; use at most that."


def _id_faults(name: str, ids: Iterable[int], rows: TokenRows) -> Iterator[str]:
    wrong = _outside(ids, rows.head)
    if wrong is not None:
        yield (
            f"{name} has token id {wrong}, and the model's head has {rows.head} rows, for ids 0 "
            f"to {rows.head - 1}; leave the token out."
        )


def _outside(ids: Iterable[int], count: int) -> int | None:
    return next((token for token in ids if not 0 <= token < count), None)


def _number_faults(params: Any) -> Iterator[str]:
    """Yield faults of numbers that no tensor and no message between processes can hold."""
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if isinstance(value, float) and not abs(value) <= _LARGEST_FLOAT32:
            yield f"{name} is {value}, which is no finite float32; use a smaller number."
        elif isinstance(value, int) and value not in (_SEEDS if name == "seed" else _INT64):
            yield f"{name} is {value}, which does not fit 64 bits; use a smaller number."
