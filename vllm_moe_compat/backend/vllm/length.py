"""The longest sequence that a model is served for.

A module may ignore a setting whose effect begins at some length
(``families.fixes.fix.LengthLimit``). Beyond it the answers would be wrong, so a default
``max_model_len`` is lowered, and an explicit one is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_NOT_EXPLICIT = (None, -1)
"""``--max-model-len`` left out, or ``auto``."""


def limit_length(model_config: ModelConfig, longest: int | None, reason: str) -> None:
    """Lower ``max_model_len`` to ``longest`` tokens; None changes nothing.

    vLLM makes its scheduler after the worker has loaded the model, and tells the front end the
    engine's length, so both follow.

    Raises:
        UnsupportedServingError: ``--max-model-len`` is larger.
    """
    length = model_config.max_model_len
    if longest is None or length <= longest:
        return
    if model_config.original_max_model_len not in _NOT_EXPLICIT:
        raise UnsupportedServingError(
            f"The embedded MLX backend cannot serve with --max-model-len {length}: the model is "
            f"right up to {longest} tokens, since beyond that {reason}; use at most {longest}, or "
            "leave the option out."
        )
    logger.warning(
        "max_model_len is lowered from %d to %d: beyond that %s", length, longest, reason
    )
    model_config.max_model_len = longest
