"""The routing of a checkpoint on a text, and how well the next layer's choice is foreseen.

The text is cut into pieces; each is a prompt of 192 tokens and 64 decode steps that are told its
next tokens. Nothing is generated.

The choice of a layer can be foreseen by giving its router what the MoE block before it is given.
``foreseen`` is the share of decode's choices that it names. What is worth reading ahead are
experts that are not in slots, so ``foreseen_misses`` is the share of misses at 25 % that it
names, and ``wasted`` how many experts it would read, per miss that it names, that nobody wants.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _expert_traces import Pass

PROMPT, STEPS = 192, 64


def record(
    path: Path, text: Path, pieces: int
) -> tuple[dict[str, list[Pass]], int, dict[str, Any]]:
    """Run the pieces; return traces by layer, the number of experts, and what was foreseen."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from transformers import AutoTokenizer

    import vllm_moe_compat
    from vllm_moe_compat.backend.model import loader

    vllm_moe_compat.apply()
    model = loader.load(str(path), None, mx.float32).model
    blocks = [
        (name, block)
        for name, block in model.named_modules()
        if hasattr(block, "switch_mlp") and hasattr(block, "gate")
    ]
    blocks.sort(key=lambda pair: [int(p) if p.isdigit() else -1 for p in pair[0].split(".")])
    chosen: dict[str, Any] = {}
    ahead: dict[str, Any] = {}
    for at, (name, block) in enumerate(blocks):
        following = blocks[at + 1] if at + 1 < len(blocks) else None
        _watch(name, block, following, chosen, ahead)
    experts = int(blocks[0][1].switch_mlp.gate_proj.weight.shape[0])
    tokens = AutoTokenizer.from_pretrained(path)(text.read_text())["input_ids"]
    traces: dict[str, list[Pass]] = {name: [] for name, _ in blocks}
    named: dict[str, list[set[int]]] = {name: [] for name, _ in blocks}
    length = PROMPT + STEPS
    for begin in range(0, min(pieces * length, len(tokens) - length), length):
        caches = make_prompt_cache(model)
        piece = mx.array([tokens[begin : begin + length]])
        for part in mx.split(piece, range(PROMPT, length), axis=1):
            mx.eval(model(part, cache=caches), chosen, ahead)
            for name, _ in blocks:
                wanted, uses = np.unique(np.array(chosen[name]), return_counts=True)
                traces[name].append(Pass(wanted.astype(np.int64), uses, part.shape[1] > 1))
                guess = np.array(ahead[name]).reshape(-1).tolist() if name in ahead else []
                named[name].append(set(guess))
    return traces, experts, _foreseen(traces, named, experts)


def _watch(
    name: str, block: Any, following: tuple[str, Any] | None, chosen: Any, ahead: Any
) -> None:
    """Have a block note what it chooses, and what the next one would choose of its input."""

    class Watched(type(block)):  # type: ignore[misc]
        def __call__(self, x: Any) -> Any:
            if following is not None:
                ahead[following[0]] = _choice(following[1], x)
            return super().__call__(x)

    class Experts(type(block.switch_mlp)):  # type: ignore[misc]
        def __call__(self, x: Any, indices: Any) -> Any:
            chosen[name] = indices
            return super().__call__(x, indices)

    block.__class__, block.switch_mlp.__class__ = Watched, Experts


def _choice(block: Any, x: Any) -> Any:
    """What a block's router chooses of ``x``."""
    import mlx.core as mx

    scores = block.gate(x)
    if isinstance(scores, tuple):
        return scores[0]
    chosen = block.top_k if hasattr(block, "top_k") else block.num_experts_per_tok
    return mx.argpartition(-scores, kth=chosen - 1, axis=-1)[..., :chosen]


def _foreseen(
    traces: dict[str, list[Pass]], named: dict[str, list[set[int]]], experts: int
) -> dict[str, Any]:
    """Shares of decode's choices and misses that were named, over layers with a layer before."""
    from vllm_moe_compat.expert_cache.policy import Policy

    uses = seen = misses = right = wrong = 0
    for layer in list(traces)[1:]:
        policy = Policy(max(1, experts // 4), experts)
        for one, guess in zip(traces[layer], named[layer], strict=True):
            absent = {expert for expert in guess if policy.slot_of[expert] < 0}
            groups = policy.plan(one.wanted, one.uses)
            if one.prefill:
                continue
            wanted = set(one.wanted.tolist())
            missing = {expert for group in groups for expert, _ in group.missing}
            uses, seen = uses + len(wanted), seen + len(wanted & guess)
            misses, right = misses + len(missing), right + len(missing & absent)
            wrong += len(absent - wanted)
    ratio: Callable[[int, int], float] = lambda a, b: round(a / b, 3) if b else 0.0  # noqa: E731
    return {
        "foreseen": ratio(seen, uses),
        "foreseen_misses": ratio(right, misses),
        "wasted": ratio(wrong, right),
    }
