"""compressed-tensors ``pack-quantized``: integers of 2, 4 or 8 bits in int32 words.

``weight_packed`` int32 ``[O, I·b/32]`` has the lowest bits first along ``I``, as MLX's own words,
and stores ``q + 2^(b-1)``. ``weight_scale`` is ``[O, I/g]``; asymmetric weights have
``weight_zero_point`` packed in the same way along ``O``; ``weight_shape`` repeats ``[O, I]``;
``weight_g_idx`` names the group of each column (``actorder: group``). The number of bits is in
the config alone.
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
    ORDER,
    ROW_WORDS,
    SCALE,
    SHAPE,
    ZERO,
    DequantizeInts,
)
from vllm_moe_compat.dtypes import FLOATS
from vllm_moe_compat.errors import UnsupportedCheckpointError

_ENDINGS = {SCALE: "_scale", ZERO: "_zero_point", ORDER: "_g_idx", SHAPE: "_shape"}


class PackQuantized(IntForm):
    """Integers in words along the rows."""

    name = "pack-quantized"
    title = "compressed-tensors packed integers"
    methods = frozenset({"compressed-tensors"})
    dtypes = frozenset({"I32"})

    def candidates(
        self, tensors: Mapping[str, TensorInfo], config: IntConfig
    ) -> Iterator[Candidate]:
        """Yield every ``…_packed`` of int32; FP4 forms have bytes under that name."""
        for name, info in tensors.items():
            if name.endswith("_packed") and info.dtype == "I32":
                weight = name.removesuffix("_packed")
                parts = tuple(
                    (role, part)
                    for role, end in _ENDINGS.items()
                    if (part := weight + end) in tensors
                )
                named = float_name(weight, tensors, "weight_packed")
                yield Candidate(named, StoredWeight(name, parts))

    def operation(
        self, parts: Parts, settings: IntSettings | None, config: IntConfig
    ) -> DequantizeInts:
        """Return the operation, with the columns that words and groups agree on."""
        if SCALE not in parts:
            raise Contradiction("weight", "has no weight_scale", "one beside it")
        if settings is None or settings.bits is None:
            found = "has no integer group in config_groups of config.json"
            raise Contradiction("weight", found, "its num_bits there")
        bits = settings.bits
        if bits not in (2, 4, 8):
            found = f"has integers of {bits} bits in words"
            raise Contradiction("weight", found, "2, 4 or 8 bits", UnsupportedCheckpointError)
        *lead, rows, words = parts["weight"].shape
        columns = words * 32 // bits
        scale = parts[SCALE].shape
        group = settings.group or columns
        if group < columns:
            # The last word of a row may be padded, a group may not.
            filled = scale[-1] * group if scale else 0
            columns = filled if 0 <= columns - filled < 32 // bits else columns
        groups = -(-columns // group)
        if scale not in ((), (1,)) or groups > 1:
            flat = groups == 1 and scale == (*lead, rows)
            expect(parts, SCALE, (*lead, rows) if flat else (*lead, rows, groups), FLOATS)
        elif parts[SCALE].dtype not in FLOATS:
            expect(parts, SCALE, scale, FLOATS)
        if ZERO in parts:
            expect(parts, ZERO, (*lead, -(-rows * bits // 32), groups), ("I32",))
        elif settings.symmetric is False:
            raise Contradiction("weight", "has no weight_zero_point", "one, as it is asymmetric")
        if ORDER in parts:
            expect(parts, ORDER, (*lead, columns), ("I32", "I64"))
        if SHAPE in parts and parts[SHAPE].shape[-1:] not in ((2,), (2 + len(lead),)):
            found = f"has the shape {list(parts[SHAPE].shape)}"
            raise Contradiction(SHAPE, found, f"{[2 + len(lead)]}")
        return DequantizeInts(
            ROW_WORDS,
            bits,
            columns,
            min(group, columns),
            f"compressed-tensors int{bits}",
            parts[SCALE].dtype,
            symmetric=ZERO not in parts,
            act_order=ORDER in parts,
        )


FORM = PackQuantized()
