"""What upstream's ``sanitize`` gave back is looked at once more before it is loaded.

MLX stores any array under any parameter's name, whatever its dtype: E4M3 bytes that
nobody multiplied out would become small integers, and the model would talk nonsense.
Missing and unexpected names are left to mlx-lm's strict load, which refuses them.
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
    """Refuse integers and bytes on their way into floating-point parameters.

    Args:
        model: the instance, its own weights still those it was made with.
        weights: what is about to be loaded.
        config: the checkpoint's; a quantised form that mlx-lm knows is its own business.
        where: for the message.

    Raises:
        UnsupportedCheckpointError: naming the tensors.
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
