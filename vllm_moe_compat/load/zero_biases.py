"""Drop the zero biases that some packers write for every linear layer.

Early releases of AutoGPTQ gave each packed layer a bias, of zeros where the model has none.
mlx-lm's strict load would refuse them as unknown parameters.
"""

from __future__ import annotations

from typing import Any

from vllm_moe_compat.checkpoint.layout import Layout
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.log import logger


def drop(model: Any, weights: dict[str, Any], layout: Layout) -> None:
    """Drop biases of zeros for which the model has no parameter, if the form writes such.

    Args:
        model: the instance.
        weights: the result of ``sanitize``, changed in place. Other unknown tensors stay, and
            the strict load names them.
        layout: the checkpoint's layout.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    if not any(found.form.zero_biases and found.weights for found in layout.numbers.found):
        return
    biases = [name for name in weights if name.endswith(".bias")]
    known = {name for name, _ in tree_flatten(model.parameters())} if biases else set()
    unknown = [name for name in biases if name not in known]
    zero = [name for name in unknown if not mx.any(weights[name]).item()]
    for name in zero:
        del weights[name]
    if zero:
        logger.info("dropped biases of zeros that the model does not have: %s", fold(zero))
