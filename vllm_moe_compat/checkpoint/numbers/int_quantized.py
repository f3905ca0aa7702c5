"""compressed-tensors ``int-quantized`` and ``naive-quantized``: one int8 for each weight.

``weight`` is int8 ``[O, I]`` and ``weight_scale`` ``[O, 1]``, ``[O, I/g]`` or one number;
asymmetric weights have ``weight_zero_point`` int8 like the scale. MLX's bytes are ``q + 128``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers.form import StoredWeight
from vllm_moe_compat.checkpoint.numbers.int_settings import IntConfig, IntSettings
from vllm_moe_compat.checkpoint.numbers.ints import (
    Candidate,
    Contradiction,
    IntForm,
    Parts,
    expect,
    float_name,
)
from vllm_moe_compat.checkpoint.numbers.ints_op import (
    BYTES,
    ORDER,
    SCALE,
    ZERO,
    DequantizeInts,
)
from vllm_moe_compat.dtypes import FLOATS

_ENDINGS = {SCALE: "_scale", ZERO: "_zero_point", ORDER: "_g_idx"}
_PARTS = tuple(_ENDINGS.values())


class IntQuantized(IntForm):
    """Integers of one byte."""

    name = "int-quantized"
    title = "int8"
    methods = frozenset({"compressed-tensors"})
    dtypes = frozenset({"I8"})

    def candidates(
        self, tensors: Mapping[str, TensorInfo], config: IntConfig
    ) -> Iterator[Candidate]:
        """Yield every matrix of int8 with a float ``…_scale``; without one, by the config."""
        ours = config.method in self.methods
        for name, info in tensors.items():
            if info.dtype != "I8" or len(info.shape) < 2 or name.endswith(_PARTS):
                continue
            scale = tensors.get(f"{name}_scale")
            if (scale is None and ours) or (scale is not None and scale.dtype in FLOATS):
                parts = tuple((r, name + e) for r, e in _ENDINGS.items() if name + e in tensors)
                yield Candidate(float_name(name, tensors, "weight"), StoredWeight(name, parts))

    def operation(
        self, parts: Parts, settings: IntSettings | None, config: IntConfig
    ) -> DequantizeInts:
        """Return the operation; the shape of the scales tells the groups."""
        if SCALE not in parts:
            raise Contradiction("weight", "is int8 without a scale", "a weight_scale beside it")
        *lead, rows, columns = parts["weight"].shape
        scale = parts[SCALE].shape
        group = (settings.group if settings else None) or 0
        shared = scale in ((), (1,), (*lead, 1, 1), (*lead, rows), (*lead, rows, 1))
        if shared and (not group or group >= columns):
            group = columns
        else:
            if not group and len(scale) == len(lead) + 2 and scale[-1] and not columns % scale[-1]:
                group = columns // scale[-1]
            groups = -(-columns // group) if group else 1
            expect(parts, SCALE, (*lead, rows, groups), FLOATS)
        if ZERO in parts:
            expect(parts, ZERO, scale, ("I8",))
        elif settings is not None and settings.symmetric is False:
            raise Contradiction("weight", "has no weight_zero_point", "one, as it is asymmetric")
        if ORDER in parts:
            expect(parts, ORDER, (*lead, columns), ("I32", "I64"))
        return DequantizeInts(
            BYTES,
            8,
            columns,
            group,
            "compressed-tensors int8",
            parts[SCALE].dtype,
            symmetric=ZERO not in parts,
            act_order=ORDER in parts,
        )


FORM = IntQuantized()
