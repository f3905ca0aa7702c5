"""Routers that an older module computes in another way than the model was trained with."""

from __future__ import annotations

from typing import Any

from vllm_moe_compat.families.fixes.fix import ForwardFix, Settings, become, named


def _everywhere(words: str) -> Any:
    return lambda settings: words


def _sparse_mixer(model: Any, settings: Settings) -> None:
    for layer in model.layers:
        layer.block_sparse_moe.jitter = settings.get("router_jitter_noise", 0.01)
        become(layer.block_sparse_moe, _phimoe_block)


def _phimoe_block(original: Any) -> type:
    import mlx.core as mx

    class Block(original):  # type: ignore[misc]
        """``PhiMoESparseMoeBlock`` with the router of Phi-3.5-MoE, SparseMixer.

        Experts are chosen one after the other. Each is weighted by a softmax over those that are
        left and whose logit is within a relative distance of ``2 * jitter`` of the largest.
        """

        def __call__(self, x: Any) -> Any:
            """``[…, H]`` to ``[…, H]``."""
            logits = self.gate(x)
            left, chosen, weights = logits, [], []
            for _ in range(self.top_k):
                top = left.max(axis=-1, keepdims=True)
                index = mx.stop_gradient(mx.argmax(left, axis=-1, keepdims=True))
                apart = (top - logits) / mx.maximum(mx.abs(logits), top)
                near = mx.where(apart > 2 * self.jitter, -mx.inf, left)
                near = mx.softmax(near, axis=-1, precise=True)
                chosen.append(index)
                weights.append(mx.take_along_axis(near, index, axis=-1))
                left = mx.put_along_axis(left, index, mx.array(-mx.inf, left.dtype), axis=-1)
            y = self.switch_mlp(x, mx.concatenate(chosen, axis=-1))
            return (y * mx.concatenate(weights, axis=-1)[..., None]).sum(axis=-2)

    return named(Block, original)


def _sigmoid(model: Any, settings: Settings) -> None:
    for layer in model.layers:
        block = layer.feed_forward
        if hasattr(block, "switch_mlp"):
            block.factor = settings.get("routed_scaling_factor", 1.0)
            become(block, _lfm2_block)


def _lfm2_block(original: Any) -> type:
    import mlx.core as mx

    class Block(original):  # type: ignore[misc]
        """``Lfm2MoeSparseMoeBlock`` with sigmoids, whose bias takes part in the choice alone."""

        def __call__(self, x: Any) -> Any:
            """``[…, H]`` to ``[…, H]``."""
            weights = mx.sigmoid(self.gate(x))
            ranks = weights
            if self.use_expert_bias:
                ranks = weights.astype(mx.float32) + self.expert_bias
            k = self.top_k
            chosen = mx.stop_gradient(mx.argpartition(ranks, kth=-k, axis=-1)[..., -k:])
            weights = mx.take_along_axis(weights, chosen, axis=-1)
            if self.norm_topk_prob:
                weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-6)
            weights = (weights * self.factor).astype(x.dtype)
            return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    return named(Block, original)


SPARSE_MIXER = ForwardFix(
    "sparse-mixer",
    "experts are weighted by a softmax over the chosen ones",
    ("router_jitter_noise",),
    _everywhere("the router SparseMixer"),
    _sparse_mixer,
)
SIGMOID_ROUTER = ForwardFix(
    "sigmoid-router",
    "experts are weighted by a softmax, not by sigmoids",
    ("routed_scaling_factor",),
    _everywhere("the sigmoid router"),
    _sigmoid,
)
