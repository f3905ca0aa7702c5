"""The backbone of an mlx-lm model: the part that turns token ids into hidden states.

mlx-lm's models are nested: the model (in a multimodal one, its ``language_model``) calls its
backbone (``model``, ``backbone``), which embeds tokens, makes masks, runs the layers and
normalises, and computes logits from what the backbone returns. What follows the backbone
(a tied head, scaled or capped logits) is that code's business, so ``output_head`` runs it on
hidden states instead of writing it again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.families.registry import row_for


def path_of(model: nn.Module) -> list[str]:
    """Return the names that lead from ``model`` to its backbone.

    Raises:
        UnsupportedServingError: no part of it holds its layers.
    """
    layers = [layer for layer in model.layers if layer is not None]
    for name, part in model.named_modules():
        held = part.get("layers")
        if name and isinstance(held, list) and any(layer is layers[0] for layer in held):
            return str(name).split(".")
    raise UnsupportedServingError(
        f"The embedded MLX backend cannot serve {type(model).__module__} with prediction heads: "
        "no part of the model holds its layers, so their output cannot be taken; serve it "
        "without speculation, or with the method ngram."
    )


def of_model(model: nn.Module) -> nn.Module:
    """Return the backbone of ``model``."""
    for name in path_of(model):
        model = model[name]
    return model


def embedding(model: nn.Module) -> nn.Module:
    """Return the token embeddings of ``model``."""
    row = row_for(type(model))
    return of_model(model)["embed_tokens" if row is None else row.embedding]


def output_head(
    model: nn.Module, weights: nn.Module | None = None
) -> Callable[[mx.array], mx.array]:
    """Return a function from the backbone's hidden states ``[B, T, H]`` to logits ``[B, T, V]``.

    It is the code of ``model`` and its parts, called with a backbone that returns what it is
    given. Weights are those of ``model``, also when their arrays are replaced later, or those of
    the linear layer ``weights``.
    """
    outer = copied = copy.copy(model)
    *between, last = path_of(model)
    for name in between:
        copied[name] = copy.copy(copied[name])
        copied = copied[name]
    if weights is not None:
        if "lm_head" not in copied:
            call: Callable[[mx.array], mx.array] = weights.__call__
            return call
        copied["lm_head"] = weights
    # Tied heads are reached through the backbone, so it keeps all of its parts.
    copied[last] = copy.copy(copied[last])
    copied[last].__class__ = subclass(type(copied[last]), __call__=_return_first)

    def logits(hidden: mx.array) -> mx.array:
        result: mx.array = outer(hidden, cache=None)
        return result

    return logits


def subclass(kind: type, **members: Any) -> type:
    """Return a class that differs from ``kind`` in ``members`` only.

    It belongs to the same module, since an attention hook looks up modules by class.
    """
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **members})


def _return_first(_: nn.Module, *args: Any, **options: Any) -> Any:
    return args[0] if args else next(iter(options.values()))
