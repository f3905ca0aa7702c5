"""A check before the first request: paged passes give what mlx-lm gives.

In: a runner whose pages are allocated. Out: nothing, or a refusal. Two short
prompts of different length, one of them longer than a small sliding window, go
through a padded prefill and two decode steps, and each result is compared with
mlx-lm's own single-sequence caches. It warms the kernels up, which has to be
done anyway, and a family whose forward pass needs something that paged caches do
not give is refused by name instead of answering nonsense.
"""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx

from vllm_moe_compat.backend.model.layers import AttentionLayer
from vllm_moe_compat.backend.step.batch import Pass, Request, make_pass
from vllm_moe_compat.backend.vllm.runner import ModelRunner
from vllm_moe_compat.errors import UnsupportedServingError

# Relative L2 error of logits. Half precision may flip a router's choice, which
# moves logits by some per cent; unrelated logits are off by more than one.
TOLERANCE = {mx.float32: 1e-3, mx.bfloat16: 0.25, mx.float16: 0.25}
LENGTHS = (7, 4)
# Windows up to this size are tried from outside, too.
SMALL_WINDOW = 256


def run(runner: ModelRunner) -> None:
    """Compare; leave pages and states as they were.

    Raises:
        UnsupportedServingError: the paged logits differ from mlx-lm's.
    """
    requests = _requests(runner)
    prompts = [(request, 0, len(request.prompt) - 1) for request in requests]
    runner.forward(make_pass(prompts), [])
    for extra in (0, 1):
        ends = [(request, len(request.prompt) - 1 + extra, 1) for request in requests]
        work: Pass = make_pass(ends)
        paged = runner.forward(work, range(len(requests)))[:, -1]
        for row, request in enumerate(requests):
            _compare(runner, request, paged[row], extra)
            request.output.append(1 + row)
    runner.memory.states.drop({request.req_id for request in requests})
    used = sorted({block for r in requests for group in r.blocks for block in group})
    for pool in runner.memory.distinct_pools:
        pool.zero(used)
        mx.eval(pool.pages)


def _requests(runner: ModelRunner) -> list[Request]:
    """Two requests, on blocks that nobody owns yet: from 1 on."""
    requests, block = [], 1
    sizes = runner.memory.block_sizes
    available = runner.memory.distinct_pools[0].num_blocks
    for row, length in enumerate(_lengths(runner, available)):
        blocks = []
        for size in sizes:
            need = -(-(length + 2) // size)
            blocks.append(list(range(block, block + need)))
            block += need
        if block > available:
            break
        prompt = [(3 + 5 * row + 7 * i) % 31 + 1 for i in range(length)]
        params = SimpleNamespace(prompt_logprobs=None)
        requests.append(Request(f"self-check-{row}", prompt, params, blocks, 0))
    return requests


def _lengths(runner: ModelRunner, available: int) -> tuple[int, int]:
    """Tokens of the two prompts; the longer one leaves the smallest window, if it is small."""
    windows = [x.window for x in runner.memory.layers if isinstance(x, AttentionLayer) and x.window]
    long = min(windows, default=0) + LENGTHS[0]
    blocks = sum(long // size + 2 for size in runner.memory.block_sizes)
    fits = long <= SMALL_WINDOW + LENGTHS[0] and blocks < available
    return (long, LENGTHS[1]) if fits else LENGTHS


def _compare(runner: ModelRunner, request: Request, paged: mx.array, step: int) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.array([request.prompt + request.output])
    own = runner.model(tokens, cache=make_prompt_cache(runner.model))[0, -1]
    difference = paged.astype(mx.float32) - own.astype(mx.float32)
    size = mx.linalg.norm(own.astype(mx.float32))
    error = float((mx.linalg.norm(difference) / size).item())  # type: ignore[arg-type]
    if not error <= TOLERANCE[own.dtype]:
        raise UnsupportedServingError(
            f"The embedded MLX backend cannot serve {type(runner.model).__module__}: paged logits "
            f"differ from mlx-lm's own by {error:.2g} (relative L2, decode step {step}, prompt of "
            f"{len(request.prompt)} tokens); use mlx-lm's own server for this model."
        )
