"""The dtypes that a load is for: they decide what upstream may do by itself.

mlx-lm's own ``sanitize`` multiplies FP8 out in bfloat16. Where another dtype serves, the
plan does it. ``inspect`` asks the same question before MLX is imported, so the device is
read off the installed distributions there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata

from vllm_moe_compat.envs import DTYPE, QUANTIZE

NONE = "none"
"""The value of ``VLLM_MOE_COMPAT_QUANTIZE`` that quantises nothing."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What a load is for.

    Attributes:
        dtype: of weights that are dequantised and not packed again: ``bfloat16``, …
        packed_dtype: of the values that are packed, and so of their scales.
        setting: the quantisation of the weights: ``none`` or a key of
            ``QUANTIZE_SETTINGS``.
        exact: whether products in bfloat16 are too coarse.
        kept_dtype: the dtype for checkpoints whose weights are not dequantised; None
            leaves them their own.
    """

    dtype: str
    packed_dtype: str
    setting: str = NONE
    exact: bool = False
    kept_dtype: str | None = None


def serving(device: str, dtype: str | None = None, *, exact: bool = False) -> Serving:
    """Work out the dtypes by the settings, the serving dtype and the device.

    MLX's CPU device multiplies gathered experts in float32 only. Packed experts are
    multiplied in any dtype on every device.

    Args:
        device: ``cpu``, or any other.
        dtype: the dtype that serves, where something serves.
        exact: whether bfloat16 products are too coarse in any case.

    Raises:
        SettingError: a variable has no valid value.
    """
    chosen = DTYPE.read()
    asked = dtype if chosen == "auto" else chosen
    target = asked or ("float32" if device == "cpu" else "bfloat16")
    return Serving(
        target, asked or "bfloat16", QUANTIZE.read(), exact or target != "bfloat16", dtype
    )


def installed_device() -> str:
    """Return the device that MLX will compute on: ``metal``, ``cuda`` or ``cpu``.

    It is read off the installed distributions: asking MLX would initialise it in a process
    that may be forked later.
    """
    if sys.platform == "darwin":
        return "metal"
    for name in ("mlx-cuda-13", "mlx-cuda-12", "mlx-cuda"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return "cuda"
    return "cpu"
