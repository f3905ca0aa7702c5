"""A checkpoint's multi-token-prediction head as MLX modules.

A head predicts the token after the next one from the hidden state of a position and the token
that follows it: both are normed, joined, and passed through one decoder layer, or a few, of the
target's kind. mlx-lm's modules drop such tensors. ``load_heads`` loads them as a second, small
model of the target's own class; see ``plan.prediction_heads``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_moe_compat.errors import CompatError, LayoutError, UnsupportedCheckpointError
from vllm_moe_compat.families.prediction_heads import NORM, PredictionHead
from vllm_moe_compat.load.options import loading_with, serving_here
from vllm_moe_compat.plan.check_heads import INSIDE
from vllm_moe_compat.plan.planned_load import PlannedLoad
from vllm_moe_compat.plan.prediction_heads import WITHOUT, find_heads

if TYPE_CHECKING:
    import mlx.nn as nn


@dataclass(frozen=True, slots=True)
class HeadParts:
    """The modules of a checkpoint's first prediction head, loaded and evaluated.

    With ``e`` the embedding of token ``i + 1`` and ``h`` the target's hidden state ``i``, both
    ``[B, T, H]``, the head computes
    ``norm(decoder(join(concatenate([embedding_norm(e), hidden_norm(h)], -1)), cache))``, with the
    parts in the other order unless ``embedding_first``; then the target's output head.

    Attributes:
        model: the mlx-lm model of the target's class that the decoder belongs to, for
            ``make_cache()`` and ``layers``. It has no embeddings and no output head.
        decoder: its part with the decoder layers. Its embeddings pass their argument on and its
            final norm is left out: ``decoder(joined [B, T, H], cache=[…])`` makes the masks,
            runs the layers and returns ``[B, T, H]``.
        join: the linear layer ``2H → H``.
        embedding_norm: norm of the embedding.
        hidden_norm: norm of the hidden state.
        norm: norm of the result; None if the head has none.
        embedding_first: whether the embedding comes first where both are concatenated.
        masks_first: whether the embedding at position 0 of a sequence counts as zeros.
        recycles_normed: whether the next draft of the same head starts from the hidden state
            after ``norm``; else from the one before.
        embedding: the head's own token embeddings, if they differ from the target's.
        output: the head's own output head, if it differs from the target's.
        weight_bytes: bytes of all of it.
    """

    model: nn.Module
    decoder: nn.Module
    join: nn.Module
    embedding_norm: nn.Module
    hidden_norm: nn.Module
    norm: nn.Module | None
    embedding_first: bool = True
    masks_first: bool = False
    recycles_normed: bool = True
    embedding: nn.Module | None = None
    output: nn.Module | None = None
    weight_bytes: int = 0


def load_heads(folder: Path, dtype: str, settle: Callable[[nn.Module], object]) -> HeadParts:
    """Load the first prediction head of a checkpoint, whose target is a load of its own.

    Only the head's tensors are read, one at a time, as in every load.

    Args:
        folder: the checkpoint.
        dtype: the serving dtype.
        settle: brings the loaded layers into the classes and dtypes that serve, and evaluates
            their parameters.

    Raises:
        CompatError: there is no head, or it cannot be used, or memory ran out.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import utils

    made: list[tuple[PlannedLoad, PredictionHead]] = []

    def view(planned: PlannedLoad) -> PlannedLoad:
        found = find_heads(planned)
        loaded = found.usable()
        assert found.facts is not None, "it is usable"
        made.append((loaded, found.facts))
        return loaded

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        model_class, args_class = utils._get_classes(config)
        if not made:
            module = model_class.__module__
            raise UnsupportedCheckpointError(
                f"{folder}: {module} is loaded without a plan, where the prediction head's was "
                f"expected; {WITHOUT}."
            )
        return _one_layer_class(model_class, *made[-1]), args_class

    with loading_with(dtype=dtype, at_once=True, record=False, view=view):
        if serving_here().experts_apart:
            raise UnsupportedCheckpointError(
                f"{folder}: prediction heads cannot be used while experts stay on disk, where all "
                f"experts in memory were expected; {WITHOUT}."
            )
        try:
            model, _ = utils.load_model(folder, lazy=True, get_model_classes=classes)
        except CompatError as error:
            if not made:
                raise  # It says already what it is about.
            raise type(error)(f"the prediction head cannot be loaded: {error}") from error
        except ValueError as error:
            if not made:
                raise
            raise LayoutError(
                f"{folder}: the prediction head does not fit {made[-1][0].module} ({error}); "
                f"{WITHOUT}."
            ) from error
    settle(model)
    mx.eval(model.parameters())
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    planned, facts = made[-1]
    return _take_apart(model, planned, facts, weights)


def _one_layer_class(
    model_class: type[nn.Module], planned: PlannedLoad, facts: PredictionHead
) -> type[nn.Module]:
    """Return a class whose models have the head's tensors, and no others."""
    import mlx.nn as nn

    assert planned.row is not None, "it is planned"
    embedding = planned.row.embedding
    stems = {name.rpartition(".")[0].rpartition(".")[2] for name in planned.headers.tensors}

    def create(model: Any, args: Any) -> None:
        model_class.__init__(model, args)
        decoder = decoder_of(model, embedding)
        del decoder.layers[facts.layers :]
        norm = decoder[facts.final_norm]
        width = norm.weight.shape[0]
        inside = decoder.layers[0][INSIDE] = nn.Module()
        inside.join = nn.Linear(2 * width, width, bias=False)
        inside.embedding, inside.hidden = nn.Module(), nn.Module()
        inside.embedding.input_layernorm = copy.deepcopy(norm)
        inside.hidden.input_layernorm = copy.deepcopy(norm)
        if NORM not in facts.parts:
            del decoder[facts.final_norm]
        for module in [m for _, m in model.named_modules()]:
            for name in (embedding, "lm_head"):
                if name in module and name not in stems:
                    del module[name]

    return type("Model", (model_class,), {"__init__": create, "__module__": model_class.__module__})


def decoder_of(model: nn.Module, embedding: str) -> Any:
    """Return the part of an mlx-lm model that has the decoder layers and the embeddings."""
    return next(
        module
        for _, module in model.named_modules()
        if embedding in module and isinstance(module.get("layers"), list)
    )


def _take_apart(
    model: nn.Module, planned: PlannedLoad, facts: PredictionHead, weights: int
) -> HeadParts:
    import mlx.nn as nn

    class PassThrough(nn.Module):  # type: ignore[misc]
        """Returns its argument."""

        def __call__(self, x: Any) -> Any:
            return x

    assert planned.row is not None, "it is planned"
    every = [module for _, module in model.named_modules()]
    decoder: Any = next(m for m in every if isinstance(m.get("layers"), list))
    inside = decoder.layers[0].pop(INSIDE)
    norm = decoder.get(facts.final_norm)
    own = decoder.get(planned.row.embedding)
    output = next((m["lm_head"] for m in every if "lm_head" in m), None)
    decoder[planned.row.embedding], decoder[facts.final_norm] = PassThrough(), PassThrough()
    for name, value in facts.indices.items():
        setattr(decoder, name, value)
    for name, value in facts.attention_has.items():
        setattr(decoder.layers[0][facts.attention], name, value)
    return HeadParts(
        model=model,
        decoder=decoder,
        join=inside.join,
        embedding_norm=inside.embedding.input_layernorm,
        hidden_norm=inside.hidden.input_layernorm,
        norm=norm,
        embedding_first=facts.embedding_first,
        masks_first=facts.masks_first,
        recycles_normed=facts.recycles_normed,
        embedding=own,
        output=output,
        weight_bytes=weights,
    )
