"""What is called in place of a module's ``sanitize``, where tensors alone are no cure.

Each function gets upstream's ``sanitize`` (to be called with the weights only), the
model, the weights and the checkpoint's config as it was read (empty where only weights
were given), and returns what ``sanitize`` would. Some give single instances of a block
a corrected forward pass; mlx-lm's classes themselves stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from vllm_moe_compat.errors import UnsupportedCheckpointError

Tensors = dict[str, Any]
Config = Mapping[str, Any]
Sanitize = Callable[[Tensors], Any]
_LAYER_61 = re.compile(r"\bmodel\.layers\.61\.")
_BIAS = "e_score_correction_bias"


def layer_61(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Keep decoder layer 61, which upstream takes for DeepSeek-V3's prediction head.

    Models of more than 61 layers have their layer 61 sanitised apart, as a layer 0:
    what upstream does to a layer does not depend on its number.
    """
    apart = {name: array for name, array in weights.items() if _LAYER_61.search(name)}
    if not apart:
        return sanitize(weights)
    for name in apart:
        del weights[name]
    result = dict(sanitize(weights))
    first = {_LAYER_61.sub("model.layers.0.", name): array for name, array in apart.items()}
    apart.clear()
    for name, array in sanitize(first).items():
        result[name.replace("model.layers.0.", "model.layers.61.")] = array
    return result


def jamba_router(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Take the routers' softmax over all experts; upstream's is over the chosen ones."""
    for layer in model.layers:
        block = layer.feed_forward
        if type(block).__name__ == "JambaSparseMoeBlock":
            _become(block, _jamba_block)
    return sanitize(weights)


@cache
def _jamba_block(original: Any) -> type:
    import mlx.core as mx

    class Block(original):  # type: ignore[misc]
        """``JambaSparseMoeBlock`` as AI21 trained it."""

        def __call__(self, x: Any) -> Any:
            """``[…, H]`` to ``[…, H]``: the chosen experts, weighed by the full softmax."""
            k = self.num_experts_per_tok
            scores = mx.softmax(self.router(x), axis=-1, precise=True)
            chosen = mx.stop_gradient(mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k])
            scores = mx.take_along_axis(scores, chosen, axis=-1)
            return (self.switch_mlp(x, chosen) * scores[..., None]).sum(axis=-2)

    return _named(Block, original)


def ernie_bias(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Route by the correction bias ``[1, E]``, which upstream deletes.

    It decides which experts are chosen; their weights are those without it.
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
        _become(block, _ernie_block)
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

    return _named(Block, original)


def hunyuan_weights(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Have HunYuan-MoE-V1's chosen experts weigh 1 together; upstream is of another model.

    Both share a module; which one it is only the config says.
    """
    if config.get("model_type") == "hunyuan_v1_moe":
        for layer in model.layers:
            if type(layer.mlp).__name__ == "MoeBlock":
                _become(layer.mlp, _hunyuan_block)
    return sanitize(weights)


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

    return _named(Block, original)


def tied_head(sanitize: Sanitize, model: Any, weights: Tensors, config: Config) -> Any:
    """Show Qwen3-VL-MoE's ``sanitize`` the output head that it asks for by name.

    A tied checkpoint leaves it out, and a tied model has no place for it.
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


def scale_rope(model: Any, config: Mapping[str, Any]) -> bool:
    """Give every layer the scaled rotary embedding that the config asks for.

    Several modules make a plain one whatever ``rope_scaling`` says. One that is not
    plain, or whose scale is not 1, was made with the config in mind and stays.

    Args:
        model: the instance.
        config: of the language model.

    Returns:
        Whether anything was replaced.

    Raises:
        UnsupportedCheckpointError: mlx-lm does not know what the config asks for.
    """
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return False
    if scaling.get("type", scaling.get("rope_type")) in (None, "default", "mrope"):
        return False
    import mlx.nn as nn
    from mlx_lm.models.rope_utils import initialize_rope

    attentions = [getattr(layer, "self_attn", None) for layer in getattr(model, "layers", ())]
    ropes = [(a, a.rope) for a in attentions if a is not None and hasattr(a, "rope")]
    if not ropes or not all(type(rope) is nn.RoPE and rope.scale == 1.0 for _, rope in ropes):
        return False
    for attention, rope in ropes:
        try:
            attention.rope = initialize_rope(
                rope.dims,
                base=rope.base,
                traditional=rope.traditional,
                scaling_config=dict(scaling),
                max_position_embeddings=config.get("max_position_embeddings"),
            )
        except (ValueError, TypeError, LookupError, AssertionError, ArithmeticError) as error:
            raise UnsupportedCheckpointError(
                f"config.json: rope_scaling is {dict(scaling)!r}, of which mlx-lm makes no rotary "
                f"embedding ({type(error).__name__}: {error}); correct the config."
            ) from error
    return True


def _become(block: Any, corrected: Callable[[Any], type]) -> None:
    """Give one instance the corrected class; a second time changes nothing."""
    if not getattr(type(block), "corrected", False):
        block.__class__ = corrected(type(block))


def _named(block: type, original: type) -> type:
    """Have the corrected block look like the original in messages and to other code."""
    block.__name__, block.__qualname__ = original.__name__, original.__qualname__
    block.__module__ = original.__module__
    block.corrected = True  # type: ignore[attr-defined]
    return block
