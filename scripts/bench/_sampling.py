"""Drawing tokens in MLX against vLLM's sampler, on the logits of one step.

Both get evaluated logits ``[8, 151936]`` in MLX and end with token ids in Python, as
after a forward pass. vLLM's side is what the backend does for requests that are not
plain: copy the logits to torch, divide by the temperature, vLLM's own masks and draw.
They take turns; the ratio is the median over rounds of MLX's time over vLLM's.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import mlx.core as mx

BATCH, VOCAB = 8, 151_936


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row per way of sampling and kind of logits."""
    from vllm_moe_compat.backend.step.mlx_sampling import SamplingRequest

    mx.random.seed(0)
    rows = []
    requests = {
        "greedy": SamplingRequest(),
        "temperature": SamplingRequest(0.8),
        "top-k 20, top-p 0.95": SamplingRequest(0.6, 20, 0.95),
        "top-p 0.9": SamplingRequest(1.0, 0, 0.9),
    }
    noise = mx.random.normal((BATCH, VOCAB))
    ranks = mx.random.permutation(mx.arange(VOCAB)).astype(mx.float32) + 1
    for kind, logits in (("peaked", noise / 2 - 1.2 * mx.log(ranks)), ("flat", noise)):
        mx.eval(logits)
        for name, request in requests.items():
            turns = [_turn(logits, request, number) for number in range(rounds + 1)][1:]
            rows.append(
                {
                    "case": f"{name}, {kind}",
                    "ratio": round(statistics.median(a / b for a, b in turns), 4),
                    "mlx_ms": round(statistics.median(a for a, _ in turns) * 1e3, 2),
                    "vllm_ms": round(statistics.median(b for _, b in turns) * 1e3, 2),
                }
            )
    return rows


def _turn(logits: mx.array, request: Any, number: int) -> tuple[float, float]:
    """Seconds in MLX and in vLLM's sampler."""
    from vllm_moe_compat.backend.step.mlx_sampling import BatchSampler

    draw, key = BatchSampler([request] * BATCH, VOCAB), mx.random.key(number)
    mx.eval(key)
    began = time.perf_counter()
    tokens: Any = draw(logits, key).tolist()
    tokens = draw.draw_undecided(logits, tokens, key)
    between = time.perf_counter()
    theirs = _vllm(logits, request)
    end = time.perf_counter()
    assert len(tokens) == len(theirs) == BATCH
    assert request.temperature or tokens == theirs
    return between - began, end - between


def _vllm(logits: mx.array, request: Any) -> list[int]:
    import torch
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.sample.sampler import Sampler

    from vllm_moe_compat.backend.vllm.sampling import to_torch

    with torch.no_grad():
        scores = to_torch(logits)
        if not request.temperature:
            return list(Sampler.greedy_sample(scores).tolist())
        scores = Sampler.apply_temperature(scores, torch.full((BATCH,), request.temperature), True)
        k = torch.full((BATCH,), request.top_k) if request.top_k else None
        p = torch.full((BATCH,), request.top_p) if request.top_p < 1 else None
        tokens, _ = TopKTopPSampler()(scores, {}, k, p)
        return list(tokens.tolist())
