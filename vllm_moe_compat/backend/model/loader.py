"""Loading a checkpoint into an mlx-lm model that is ready to serve.

mlx-lm loads the model as it would without this backend; the load hooks
(``vllm_moe_compat.load``) are installed and carry out the load plan. Afterwards the weights are
cast to the serving dtype and the layers are described.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.model.dry_run import DryRun, dry_run
from vllm_moe_compat.backend.model.exact_scales import keep_scales
from vllm_moe_compat.backend.model.experts import widen_experts
from vllm_moe_compat.backend.model.prediction_heads import PredictionHeads
from vllm_moe_compat.backend.pages.layers import AttentionLayer, Layer
from vllm_moe_compat.checkpoint import file_stamps
from vllm_moe_compat.checkpoint.file_stamps import FileStamps
from vllm_moe_compat.expert_cache.install import containers
from vllm_moe_compat.load.memory import give_back
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.load.prediction_heads import HeadParts, load_heads
from vllm_moe_compat.load.report import last_report
from vllm_moe_compat.log import logger
from vllm_moe_compat.plan.expert_cache import CachePlan
from vllm_moe_compat.ranks import pipeline
from vllm_moe_compat.ranks.layer_range import Range
from vllm_moe_compat.ranks.share import Share
from vllm_moe_compat.who_serves import who_serves


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model.

    Attributes:
        model: the mlx-lm model, all of its weights evaluated.
        layers: one description per cache.
        weight_bytes: bytes of all weights.
        widened_bytes: the part of them added by widening experts to float32.
        max_length: tokens up to which the model is right; None for any.
        max_length_reason: what it computes beyond that.
        stamps: of the files that it was loaded from.
        expert_cache: the slots of each layer with experts; None if all experts are in memory.
        heads: the checkpoint's prediction heads; None if they are not loaded.
        head_bytes: bytes of their weights.
    """

    model: nn.Module
    layers: list[Layer]
    weight_bytes: int
    widened_bytes: int
    max_length: int | None = None
    max_length_reason: str = ""
    stamps: FileStamps = field(default_factory=FileStamps)
    expert_cache: CachePlan | None = None
    heads: PredictionHeads | None = None
    head_bytes: int = 0


def load(
    model: str,
    revision: str | None,
    dtype: mx.Dtype,
    group: mx.distributed.Group | None = None,
    stage: Callable[[int], tuple[int, int]] | None = None,
    *,
    heads: bool = False,
) -> ServedModel:
    """Load the checkpoint ``model`` (a folder, or a repository in the local cache).

    With ``heads``, its prediction heads too.

    With a ``group`` of ranks, this rank reads and keeps its share of the weights: of each layer,
    or, with a ``stage``, the layers whose range it returns for their number.

    Raises:
        CompatError: the checkpoint is broken or cannot be represented.
        UnsupportedServingError: a layer cannot be stored in pages.
    """
    from mlx_lm import utils

    path = _folder(model, revision)
    stamps = file_stamps.take(path.absolute())
    share: Share | Range | None = None
    if group is not None:
        share = Share(path, group) if stage is None else Range(stage, pipeline.Neighbours(group))
    options = {"dtype": str(dtype).rpartition(".")[2], "at_once": True, "arrange": share}
    options |= {"ranks": 1 if group is None else group.size(), "layers": stage}
    with loading_with(**options, settle=lambda experts: _settle(experts, dtype)):
        loaded, _ = utils.load_model(path, lazy=True)
    if share is not None and not share.done:
        share.cut(loaded)  # No plan is made for the module: its tensors are unread.
    report = last_report()
    if report is None or report.path != str(path):  # That of another load: this one had no plan.
        limit, reason, cache = None, "", None
    else:
        limit, reason = report.max_length, report.max_length_reason
        cache = report.expert_cache
    # Both calls only build graphs. The first one refuses a model before its weights are read,
    # the second one sees the final dtypes.
    dry_run(loaded, describe(loaded))
    kept, widened = _settle(loaded, dtype)
    if kept:
        logger.info("%d scales and biases of packed weights stay float32, to be exact", kept)
    # Values that mlx-lm left lazy have been read since.
    file_stamps.check(
        stamps, "something is writing to the checkpoint, so wait until that has ended"
    )
    give_back()
    result = dry_run(loaded, describe(loaded))
    pipeline.check_dtype(loaded)
    weights = sum(array.nbytes for _, array in tree_flatten(loaded.parameters()))
    weights += sum(experts.nbytes for experts in containers(loaded))
    logger.info(
        "the embedded MLX platform serves, since %s: loaded %s on %s, %s, %.1f MiB of weights%s, "
        "%s%s",
        who_serves()[1],
        type(loaded).__module__,
        mx.default_device(),
        str(dtype).rpartition(".")[2],
        weights / 2**20,
        f" (experts widened to float32: +{widened / 2**20:.1f} MiB)" if widened else "",
        _layer_counts(result.layers),
        _single_sequence(result),
    )
    found = ServedModel(loaded, result.layers, weights, widened, limit, reason, stamps, cache)
    return _with_heads(found, path, dtype) if heads else found


def _with_heads(served: ServedModel, path: Path, dtype: mx.Dtype) -> ServedModel:
    """Load the prediction heads of a loaded model.

    Raises:
        CompatError: there are none, or they cannot be used.
        UnsupportedServingError: their caches cannot be stored in pages.
    """
    parts = load_prediction_heads(str(path), None, dtype)
    heads = PredictionHeads(served.model, parts)
    file_stamps.check(
        served.stamps, "something is writing to the checkpoint, so wait until that has ended"
    )
    return replace(served, heads=heads, head_bytes=parts.weight_bytes)


def load_prediction_heads(model: str, revision: str | None, dtype: mx.Dtype) -> HeadParts:
    """Load the first prediction head of the checkpoint that ``load`` has loaded.

    Raises:
        CompatError: the checkpoint has no head, or one that cannot be used.
    """
    path = _folder(model, revision)
    name = str(dtype).rpartition(".")[2]
    parts = load_heads(path, name, lambda head: _settle(head, dtype))
    give_back()
    logger.info(
        "%s: loaded the first prediction head, %.1f MiB of weights",
        path,
        parts.weight_bytes / 2**20,
    )
    return parts


def _folder(model: str, revision: str | None) -> Path:
    """Return the folder of a checkpoint, or of a repository in the local cache."""
    from mlx_lm import utils

    path = Path(model)
    return path if path.exists() else Path(utils._download(model, revision=revision))


def _layer_counts(layers: Sequence[Layer]) -> str:
    """Count the layers by kind: ``24 softmax (12 with a window of 128 tokens) and …``."""
    softmax = [layer for layer in layers if isinstance(layer, AttentionLayer)]
    counted = sorted(Counter(x.window for x in softmax if x.window).items())
    windows = ", ".join(f"{count} with a window of {size} tokens" for size, count in counted)
    found = f"{len(softmax)} softmax{f' ({windows})' if windows else ''}"
    return f"{found} and {len(layers) - len(softmax)} state layers"


def _single_sequence(result: DryRun) -> str:
    """Say that, and why, the model computes one sequence at a time; empty if it does not."""
    if not result.failure:
        return ""
    return f", one sequence at a time, since its code fails on several ({result.failure})"


def _settle(model: nn.Module, dtype: mx.Dtype) -> tuple[int, int]:
    """Give layers the classes and dtypes that serve, and evaluate all parameters.

    Returns:
        The number of scales that stay float32, and the bytes added by widening experts.
    """
    kept = keep_scales(model, dtype)
    _cast(model, dtype, kept)
    return len(kept), widen_experts(model)


def _cast(model: nn.Module, dtype: mx.Dtype, kept: Collection[str]) -> None:
    """Cast floating parameters to ``dtype`` and evaluate all parameters, one at a time.

    One at a time bounds the peak at the model plus one tensor. Parameters that the model itself
    excludes from casts (``A_log`` of Qwen3.5) keep their dtype, and so do ``kept`` and arrays
    that are no parameters, whose names start with an underscore: rotary frequencies in half
    precision turn by the wrong angle after a few hundred tokens.
    """
    keep = getattr(model, "cast_predicate", lambda _: True)
    for name, module in model.named_modules():
        for key in list(module.keys()):
            value = module[key]
            if not isinstance(value, mx.array) or key == "global_scale":
                continue  # MLX's kernels take a global scale in float32 only.
            path = f"{name}.{key}" if name else key
            is_float = not key.startswith("_") and mx.issubdtype(value.dtype, mx.floating)
            if is_float and value.dtype != dtype and path not in kept and keep(path):
                value = value.astype(dtype)
                module[key] = value
            mx.eval(value)
