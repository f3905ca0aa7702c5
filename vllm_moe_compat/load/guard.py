"""Check the result of upstream's ``sanitize`` before it is loaded.

MLX assigns an array of any dtype to a parameter: E4M3 bytes that were not dequantised would
become small integers, and the model would generate nonsense. Packed words would be taken for
a format that their shapes happen to fit. Missing and unexpected names are
left to mlx-lm's strict load, which refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.checkpoint.numbers import FORMS
from vllm_moe_compat.checkpoint.operations import AFFINE_BITS, AFFINE_GROUPS
from vllm_moe_compat.dtypes import stored_name
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.plan.quantization import DEQUANTIZED

_BYTE_FORMATS = {(4, 16), (4, 32), (8, 32)}
"""Bits and group of nvfp4, mxfp4 and mxfp8, whose scales are bytes."""


def check(model: Any, weights: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Refuse integer tensors for floating-point parameters, and words that no format explains.

    Args:
        model: the instance, with its initial weights.
        weights: the tensors to load.
        config: the original config; checkpoints in quantised forms of mlx-lm are not checked.
        where: the checkpoint, for the message.

    Raises:
        UnsupportedCheckpointError: a tensor is of an integer dtype, or packed words are in no
            format of MLX.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    ours = {None, DEQUANTIZED, *(method for form in FORMS for method in form.methods)}
    methods = {entry.get("quant_method") for entry in quantization_configs(config)}
    if config.get("quantization") is not None or not methods <= ours:
        return
    _check_packed(weights, parameters := dict(tree_flatten(model.parameters())), where)
    found = {
        name: array.dtype
        for name, array in weights.items()
        if not mx.issubdtype(array.dtype, mx.floating)
        and f"{name.rpartition('.')[0]}.scales" not in weights
    }
    if not found:
        return
    wrong = [
        name
        for name in found
        if name in parameters and mx.issubdtype(parameters[name].dtype, mx.floating)
    ]
    if wrong:
        kind = str(found[wrong[0]]).rpartition(".")[2]
        raise UnsupportedCheckpointError(
            f"{where}{': ' if where else ''}{fold(wrong)} would be loaded as {kind}, expected a "
            f"floating-point tensor for {type(model).__module__}; load a bf16 or FP8 release of "
            "the model instead."
        )


def _check_packed(weights: Mapping[str, Any], parameters: Mapping[str, Any], where: str) -> None:
    """Refuse words whose shape, scales and biases are in no format that MLX computes in.

    ``load_model`` infers bits and group from these shapes.
    """
    wrong: list[str] = []
    for name, scales in weights.items():
        path, _, kind = name.rpartition(".")
        words, given = weights.get(f"{path}.weight"), parameters.get(f"{path}.weight")
        if kind != "scales" or words is None or given is None or not given.ndim:
            continue
        columns, biases = given.shape[-1], weights.get(f"{path}.biases")
        stored = stored_name(scales.dtype)
        bits, rest = divmod(32 * words.shape[-1], columns)
        group = columns / max(scales.shape[-1], 1)
        if biases is None:
            fits = stored == "U8" and (bits, group) in _BYTE_FORMATS
        else:
            affine = bits in AFFINE_BITS and group in AFFINE_GROUPS
            fits = affine and stored != "U8" and biases.shape == scales.shape
        if rest or not fits or stored_name(words.dtype) != "U32":
            wrong.append(f"{path}.weight")
    if wrong:
        raise UnsupportedCheckpointError(
            f"{where}{': ' if where else ''}{fold(wrong)} would be loaded as packed words that "
            "no format of MLX explains, where scales, biases and words of one format were "
            "expected; load a bf16 or FP8 release of the model instead."
        )
