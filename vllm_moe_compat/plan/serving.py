"""The dtypes and the quantisation setting of a load.

They decide what is left to upstream: mlx-lm's own ``sanitize`` dequantises FP8 in bfloat16, so
for any other dtype the plan does it. ``inspect`` needs the same answer without importing MLX
and takes the device from the installed distributions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata

from vllm_moe_compat.envs import DTYPE, QUANTIZE
from vllm_moe_compat.plan.expert_cache import CacheSetting

NONE = "none"
"""The value of ``VLLM_MOE_COMPAT_QUANTIZE`` that quantises nothing."""


@dataclass(frozen=True, slots=True)
class Serving:
    """The dtypes and the quantisation setting of a load.

    Attributes:
        dtype: dtype of weights that are dequantised and not quantised again: ``bfloat16``, …
        packed_dtype: dtype of the values that are quantised, and of affine scales.
        setting: ``none`` or a key of ``QUANTIZE_SETTINGS``.
        exact: whether products in bfloat16 are too coarse.
        kept_dtype: dtype of checkpoints without dequantised weights; None for their own.
        complete: whether a part of the model's tensors is made; see ``planner.Plan``.
        experts_apart: whether experts stay on disk, so that each can be made by itself.
        ranks: that divide the model's weights.
    """

    dtype: str
    packed_dtype: str
    setting: str = NONE
    exact: bool = False
    kept_dtype: str | None = None
    complete: bool = False
    experts_apart: bool = False
    ranks: int = 1


def serving(device: str, dtype: str | None = None, *, exact: bool = False) -> Serving:
    """Return the dtypes for the environment variables, the serving dtype and the device.

    MLX's CPU device multiplies gathered experts in float32 only. Packed experts are
    multiplied in any dtype on every device.

    Args:
        device: ``cpu``, or any other name.
        dtype: the serving dtype; None outside of serving.
        exact: whether bfloat16 products are too coarse in any case.

    Raises:
        SettingError: the value of an environment variable is not valid.
    """
    chosen = DTYPE.read()
    requested = dtype if chosen == "auto" else chosen
    target = requested or ("float32" if device == "cpu" else "bfloat16")
    return Serving(
        target,
        requested or "bfloat16",
        QUANTIZE.read(),
        exact or target != "bfloat16",
        dtype,
        experts_apart=CacheSetting.read() is not None,
    )


def installed_device() -> str:
    """Return the device that MLX will compute on: ``metal``, ``cuda`` or ``cpu``.

    The installed distributions tell. Asking MLX would initialise it in a process that may be
    forked later.
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
