"""A check before the first request: paged passes must reproduce mlx-lm's own logits.

Two short prompts of different length, the longer one longer than a small sliding window, go
through a padded prefill and two decode steps, and one of them through a third alone. Each result
is compared with that of one pass over mlx-lm's single-sequence caches. The check also compiles
the kernels, which has to happen before serving anyway, and it refuses a family whose forward pass
needs something that paged caches do not provide, instead of serving wrong tokens.

Some token of a fine-tune may have NaN in its row, and requests with it fail alone. So if mlx-lm's
own logits are not finite, the check takes tokens with finite ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer
from vllm_moe_compat.backend.pages.storage import LayerStorage
from vllm_moe_compat.backend.step.batch import Pass, Request, make_pass
from vllm_moe_compat.backend.step.forward import Forward
from vllm_moe_compat.errors import UnsupportedServingError

# Relative L2 error of logits. Half precision may change a router's choice, which moves logits by
# some per cent; unrelated logits differ by more than 1.
TOLERANCE = {mx.float32: 1e-3, mx.bfloat16: 0.25, mx.float16: 0.25}
LENGTHS = (7, 4)
# The last step has one row: MLX's CPU build may need other kernels for it.
STEPS = 3
TOKENS = range(1, 32)
# Windows up to this size are exceeded by the longer prompt.
SMALL_WINDOW = 256


def run(forward: Forward, layers: Sequence[Layer] | None = None) -> None:
    """Compare paged passes with mlx-lm's; leave pages and states as they were.

    Args:
        forward: what is checked.
        layers: of all ranks of a pipeline, which have to check the same prompts; None for its own.

    Raises:
        UnsupportedServingError: the logits differ, or no token gives finite ones.
        CompatError: an expert cannot be read.
    """
    layers = forward.storage.layers if layers is None else layers
    if not _agree(forward, TOKENS, layers):
        tokens = _finite_tokens(forward.model)
        if not tokens or not _agree(forward, tokens, layers):
            raise UnsupportedServingError(
                f"The embedded MLX backend cannot serve {type(forward.model).__module__}: mlx-lm's "
                "own logits are NaN or infinite; the weights hold such values, or overflow "
                "in this dtype: use --dtype float32, or another copy of the checkpoint."
            )


def _agree(forward: Forward, tokens: Sequence[int], layers: Sequence[Layer]) -> bool:
    """Compare on prompts of ``tokens``; return False if mlx-lm's logits are not finite."""
    storage = forward.storage
    requests = requests_on_pages(storage, tokens, layers)
    answers = [tokens[row % len(tokens)] for row in range(len(requests))]
    own = [_own_logits(forward.model, *pair) for pair in zip(requests, answers, strict=True)]
    if not all(mx.isfinite(logits.max()).item() for logits in own):
        return False
    try:
        for part in _prefill(requests):
            forward(part, [])
            _raise_unread(forward)
        for step in range(STEPS):
            asked = requests if step < STEPS - 1 else requests[:1]
            work: Pass = make_pass([(one, len(one.prompt) - 1 + step, 1) for one in asked])
            paged = forward(work, range(len(asked)))[:, -1]
            _raise_unread(forward)
            for row, request in enumerate(asked):
                _compare(forward.model, request, paged[row], own[row][step], step)
                request.output.append(answers[row])
    finally:
        storage.states.drop({request.req_id for request in requests})
        forward.take_hidden()
        used = sorted({block for r in requests for group in r.blocks for block in group})
        for pool in storage.distinct_pools:
            pool.zero(used)
            mx.eval(pool.pages)
    return True


def _raise_unread(forward: Forward) -> None:
    for error in forward.failed_rows.values():
        raise error


def _prefill(requests: list[Request]) -> list[Pass]:
    """Return passes over all tokens of the prompts but the last ones.

    The part of a long prompt beyond the usual length comes first and alone: padding the other
    prompt to it would double the work.
    """
    begin = [max(0, len(request.prompt) - LENGTHS[0]) for request in requests]
    parts = [
        make_pass([(request, 0, start)])
        for request, start in zip(requests, begin, strict=True)
        if start
    ]
    rest = [
        (request, start, len(request.prompt) - 1 - start)
        for request, start in zip(requests, begin, strict=True)
    ]
    return [*parts, make_pass(rest)]


def _finite_tokens(model: nn.Module) -> list[int]:
    """Return those of ``TOKENS`` after which mlx-lm's logits are finite."""
    from mlx_lm.models.cache import make_prompt_cache

    found = []
    for token in TOKENS:
        logits = model(mx.array([[token]]), cache=make_prompt_cache(model))
        if mx.isfinite(logits.max()).item():
            found.append(token)
    return found


def requests_on_pages(
    storage: LayerStorage, tokens: Sequence[int], layers: Sequence[Layer]
) -> list[Request]:
    """Return two requests on the blocks from 1 on, or one if the pool is too small for two."""
    requests, block = [], 1
    sizes = storage.block_sizes
    available = storage.distinct_pools[0].num_blocks
    for row, length in enumerate(_lengths(storage, available, layers)):
        blocks = []
        for size in sizes:
            need = -(-(length + STEPS) // size)
            blocks.append(list(range(block, block + need)))
            block += need
        if block > available:
            break
        prompt = [tokens[(3 + 5 * row + 7 * i) % len(tokens)] for i in range(length)]
        params = SimpleNamespace(prompt_logprobs=None)
        requests.append(Request(f"self-check-{row}", prompt, params, blocks, 0))
    return requests


def _lengths(storage: LayerStorage, available: int, layers: Sequence[Layer]) -> tuple[int, int]:
    """Return the lengths of the prompts; the first exceeds the smallest window if it is small."""
    windows = [x.window for x in layers if isinstance(x, AttentionLayer) and x.window]
    long = min(windows, default=0) + LENGTHS[0]
    blocks = sum(long // size + 2 for size in storage.block_sizes)
    fits = long <= SMALL_WINDOW + LENGTHS[0] and blocks < available
    return (long, LENGTHS[1]) if fits else LENGTHS


def _own_logits(model: nn.Module, request: Request, answer: int) -> mx.array:
    """Return mlx-lm's logits ``[STEPS, V]`` after the prompt, and after each token ``answer``.

    One pass gives them all, since no token sees a later one.
    """
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.array([request.prompt + [answer] * (STEPS - 1)])
    own: mx.array = model(tokens, cache=make_prompt_cache(model))[0, -STEPS:]
    mx.eval(own)
    return own


def _compare(model: nn.Module, request: Request, paged: mx.array, own: mx.array, step: int) -> None:
    difference = paged.astype(mx.float32) - own.astype(mx.float32)
    size = mx.linalg.norm(own.astype(mx.float32))
    error = float((mx.linalg.norm(difference) / size).item())  # type: ignore[arg-type]
    if not error <= TOLERANCE[own.dtype]:
        raise UnsupportedServingError(
            f"The embedded MLX backend cannot serve {type(model).__module__}: paged logits "
            f"differ from mlx-lm's own by {error:.2g} (relative L2, decode step {step}, prompt of "
            f"{len(request.prompt)} tokens); use mlx-lm's own server for this model."
        )
