"""Check the result of upstream's ``sanitize`` before it is loaded.

MLX assigns an array of any dtype to a parameter: E4M3 bytes that were not dequantised would
become small integers, and the model would generate nonsense. Missing and unexpected names are
left to mlx-lm's strict load, which refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moe_compat.checkpoint.config import quantization_configs
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.checkpoint.numbers import FORMS
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.plan.quantization import DEQUANTIZED


def check(model: Any, weights: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Refuse integer tensors for floating-point parameters.

    Args:
        model: the instance, with its initial weights.
        weights: the tensors to load.
        config: the original config; checkpoints in quantised forms of mlx-lm are not checked.
        where: the checkpoint, for the message.

    Raises:
        UnsupportedCheckpointError: a tensor is of an integer dtype.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    ours = {None, DEQUANTIZED, *(method for form in FORMS for method in form.methods)}
    methods = {entry.get("quant_method") for entry in quantization_configs(config)}
    if config.get("quantization") is not None or not methods <= ours:
        return
    found = {
        name: array.dtype
        for name, array in weights.items()
        if not mx.issubdtype(array.dtype, mx.floating)
        and f"{name.rpartition('.')[0]}.scales" not in weights
    }
    if not found:
        return
    parameters = dict(tree_flatten(model.parameters()))
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
