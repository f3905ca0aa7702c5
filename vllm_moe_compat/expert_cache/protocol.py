"""What the container of cached experts needs from whatever reads experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vllm_moe_compat.errors import CompatError

Bytes: TypeAlias = npt.NDArray[np.uint8]
"""Writable bytes of one parameter of one expert, uint8 ``[nbytes]``, in row-major order."""


class Spec(NamedTuple):
    """One parameter of one expert, as it is held.

    Attributes:
        shape: without the axis of experts.
        dtype: of the values in memory.
        rounded: dtype to which the values are rounded before; None for no other one.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    rounded: mx.Dtype | None = None

    def is_rounded(self, dtype: mx.Dtype | None) -> bool:
        """Return whether values of ``dtype`` need no other rounding than to ``dtype``."""
        return self.rounded is None or (dtype is not None and self.rounded == dtype)


class ExpertSource(Protocol):
    """Reads experts of one container."""

    @property
    def experts(self) -> int:
        """E, the number of experts."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """``gate_proj.weight`` → its spec, for every parameter that has an axis of experts."""

    @property
    def nbytes(self) -> int:
        """Bytes of one expert, as held."""

    def read(
        self, experts: Sequence[int], into: Callable[[int], Mapping[str, Bytes]]
    ) -> Mapping[int, CompatError]:
        """Write each of ``experts`` into its bytes, ``into(expert)``, one for every spec.

        Returns:
            The experts that could not be read. Their bytes may be half written.
        """
