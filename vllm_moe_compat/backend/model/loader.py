"""From a checkpoint folder to a model that is ready to serve.

In: the model's path and the serving dtype. Out: an mlx-lm model whose weights
went through the load plan (``vllm_moe_compat.load.patching`` is installed by then),
in that dtype, with a description of its layers. mlx-lm loads it, exactly as it
would without us; what the hooks did is in the load report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from vllm_moe_compat import plugin
from vllm_moe_compat.backend.model import experts
from vllm_moe_compat.backend.model.layers import AttentionLayer, Layer, Rows, describe, rows_of
from vllm_moe_compat.backend.step import dry_run as trial
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.log import logger


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model, its layers, and what its weights hold."""

    model: nn.Module
    layers: list[Layer]
    weight_bytes: int
    widened_bytes: int


def load(model: str, revision: str | None, dtype: mx.Dtype) -> ServedModel:
    """Load the checkpoint ``model`` (a folder, or a repository in the local cache).

    Raises:
        CompatError: the checkpoint is broken or cannot be represented.
        UnsupportedServingError: a layer has no paged storage.
    """
    from mlx_lm import utils

    path = Path(model)
    if not path.exists():
        path = Path(utils._download(model, revision=revision))
    with loading_with(dtype=str(dtype).rpartition(".")[2]):
        loaded, _ = utils.load_model(path, lazy=True)
    # Built and not computed: a refusal comes before the weights are read.
    trial.settle(loaded, describe(loaded))
    _cast(loaded, dtype)
    widened = experts.prepare(loaded)
    mx.clear_cache()
    layers = trial.settle(loaded, describe(loaded))
    weights = sum(array.nbytes for _, array in tree_flatten(loaded.parameters()))
    logger.info(
        "the embedded MLX platform serves, since %s: handed it %s on %s, %s, %.1f MiB of "
        "weights%s, %s",
        plugin.who_serves()[1],
        type(loaded).__module__,
        mx.default_device(),
        str(dtype).rpartition(".")[2],
        weights / 2**20,
        f" (experts widened to float32: +{widened / 2**20:.1f} MiB)" if widened else "",
        _kinds(layers),
    )
    return ServedModel(loaded, layers, weights, widened)


def _kinds(layers: Sequence[Layer]) -> str:
    """How many layers keep what: ``24 softmax (12 with a window of 128 tokens) …``."""
    softmax = [layer for layer in layers if isinstance(layer, AttentionLayer)]
    counted = sorted(Counter(x.window for x in softmax if x.window).items())
    windows = ", ".join(f"{count} with a window of {size} tokens" for size, count in counted)
    words = f"{len(softmax)} softmax{f' ({windows})' if windows else ''}"
    alone = ", one sequence at a time" if rows_of(layers) is Rows.SINGLE else ""
    return f"{words} and {len(layers) - len(softmax)} state layers{alone}"


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Evaluate every parameter, floating ones in ``dtype``, one at a time.

    One at a time bounds the peak at the model plus one tensor. What the model
    itself excludes from casts (Qwen3.5's ``A_log``) keeps its dtype.
    """
    keep = getattr(model, "cast_predicate", lambda _: True)
    for name, module in model.named_modules():
        for key in list(module.keys()):
            value = module[key]
            if not isinstance(value, mx.array):
                continue
            path = f"{name}.{key}" if name else key
            if mx.issubdtype(value.dtype, mx.floating) and value.dtype != dtype and keep(path):
                value = value.astype(dtype)
                module[key] = value
            mx.eval(value)
