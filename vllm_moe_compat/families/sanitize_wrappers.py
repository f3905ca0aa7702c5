"""Wrappers of a module's ``sanitize`` for defects that a plan cannot correct.

Each wrapper takes upstream's ``sanitize`` (a function of the weights alone), the model, the
weights and the checkpoint's original config (empty if only weights were given), and returns
the sanitized weights. Some wrappers give the blocks of this model a corrected forward pass;
mlx-lm's classes are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from vllm_moe_compat.families.fixes.fix import become, named

Tensors = dict[str, Any]
Config = Mapping[str, Any]
Sanitize = Callable[[Tensors], Any]
_LAYER_61 = re.compile(r"\bmodel\.layers\.61\.")
_BIAS = "e_score_correction_bias"


def layer_61(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Keep decoder layer 61, which upstream drops as DeepSeek-V3's prediction head.

    In models of more than 61 layers, layer 61 is sanitized on its own under the name of layer
    0, since upstream treats all other layers alike.
    """
    layer = {name: array for name, array in weights.items() if _LAYER_61.search(name)}
    if not layer:
        return sanitize(weights)
    for name in layer:
        del weights[name]
    result = dict(sanitize(weights))
    first = {_LAYER_61.sub("model.layers.0.", name): array for name, array in layer.items()}
    layer.clear()
    for name, array in sanitize(first).items():
        result[name.replace("model.layers.0.", "model.layers.61.")] = array
    return result


def jamba_router(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Take the router's softmax over all experts; upstream takes it over the chosen ones."""
    for layer in model.layers:
        block = layer.feed_forward
        if type(block).__name__ == "JambaSparseMoeBlock":
            become(block, _jamba_block)
    return sanitize(weights)


@cache
def _jamba_block(original: Any) -> type:
    import mlx.core as mx

    class Block(original):  # type: ignore[misc]
        """``JambaSparseMoeBlock`` with the router that the model was trained with."""

        def __call__(self, x: Any) -> Any:
            """``[…, H]`` to ``[…, H]``: chosen experts, weighted by the softmax over all."""
            k = self.num_experts_per_tok
            scores = mx.softmax(self.router(x), axis=-1, precise=True)
            chosen = mx.stop_gradient(mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k])
            scores = mx.take_along_axis(scores, chosen, axis=-1)
            return (self.switch_mlp(x, chosen) * scores[..., None]).sum(axis=-2)

    return named(Block, original)


def ernie_bias(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Route with the correction bias ``[1, E]``, which upstream deletes.

    The bias takes part in the choice of experts, not in their weights.
    """
    biases = {
        name: weights.pop(name)
        for name in list(weights)
        if name.endswith(_BIAS) and name.startswith("model.layers.")
    }
    result = dict(sanitize(weights))
    for name, bias in biases.items():
        layer = name.partition(".mlp.")[0]
        block = model.layers[int(layer.rpartition(".")[2])].mlp
        become(block, _ernie_block)
        block[_BIAS] = bias.reshape(-1)
        result[f"{layer}.mlp.{_BIAS}"] = bias.reshape(-1)
    return result


@cache
def _ernie_block(original: Any) -> type:
    import mlx.core as mx

    class Block(original):  # type: ignore[misc]
        """``Ernie4_5_MoeMLP`` with its correction bias ``[E]``."""

        def __call__(self, x: Any) -> Any:
            """``[…, H]`` to ``[…, H]``."""
            gates = self.gate_act(self.gate(x).astype(mx.float32))
            corrected = gates + self[_BIAS]
            k = self.k
            chosen = mx.stop_gradient(mx.argpartition(-corrected, kth=k - 1, axis=-1)[..., :k])
            scores = mx.take_along_axis(gates, chosen, axis=-1)
            scores = scores / mx.maximum(scores.sum(axis=-1, keepdims=True), 1e-12)
            y = self.switch_mlp(x, chosen)
            y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
            return y if self.shared_experts is None else y + self.shared_experts(x)

    return named(Block, original)


def hunyuan_weights(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Normalise the weights of the chosen experts for HunYuan-MoE-V1.

    mlx-lm's module is that of an earlier model, which does not normalise. The config tells the
    two models apart.
    """
    if config.get("model_type") == "hunyuan_v1_moe":
        for layer in model.layers:
            if type(layer.mlp).__name__ == "MoeBlock":
                become(layer.mlp, _hunyuan_block)
    return own_head(sanitize, model, weights, config)


@cache
def _hunyuan_block(original: Any) -> type:
    import mlx.core as mx

    class Block(original):  # type: ignore[misc]
        """``MoeBlock`` with the weights of the chosen experts normalised."""

        def __call__(self, x: Any) -> Any:
            """``[…, H]`` to ``[…, H]``."""
            gates = mx.softmax(self.gate(x), axis=-1, precise=True)
            k = self.top_k
            chosen = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k])
            scores = mx.take_along_axis(gates, chosen, axis=-1).astype(mx.float32)
            scores = scores / scores.sum(axis=-1, keepdims=True)
            y = self.switch_mlp(x, chosen)
            y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
            return y + self.shared_mlp(x) if self.use_shared_mlp else y

    return named(Block, original)


def own_head(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Compute logits with the checkpoint's own output head if it has one.

    The module always takes the embeddings. A head that equals them was left out before.
    """
    result = sanitize(weights)
    weight = result.get("lm_head.weight")
    if weight is not None:
        import mlx.nn as nn

        model.lm_head = nn.Linear(model.args.hidden_size, model.args.vocab_size, bias=False)
        become(model, _with_own_head)
    return result


@cache
def _with_own_head(original: Any) -> type:
    import mlx.core as mx

    class Model(original):  # type: ignore[misc]
        """A model whose logits come from ``lm_head``, scaled as upstream scales them."""

        def __call__(self, inputs: Any, cache: Any = None, **kwargs: Any) -> Any:
            """``[B, L]`` to logits ``[B, L, V]``."""
            out = self.lm_head(self.model(inputs, cache, **kwargs))
            if (scale := getattr(self.args, "logit_scale", None)) is not None:
                out = out * scale
            if (cap := getattr(self.args, "final_logit_softcapping", None)) is not None:
                out = mx.tanh(out / cap) * cap
            return out

    return named(Model, original)


def tied_head(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Give Qwen3-VL-MoE's ``sanitize`` an output head, which it requires.

    A tied checkpoint has none, and a tied model has no parameter for it.
    """
    absent = not any(name.endswith("lm_head.weight") for name in weights)
    if absent:
        for name in list(weights):
            if name.endswith("embed_tokens.weight"):
                head = "lm_head.weight"
                if name.startswith("language_model."):
                    head = f"language_model.{head}"
                weights[head] = weights[name]
    result = sanitize(weights)
    if absent and "lm_head" not in model.language_model:
        result.pop("language_model.lm_head.weight", None)
    return result
