"""GPTQ, and AutoRound in GPTQ's packing: integers of 2, 3, 4 or 8 bits in words along ``I``.

``qweight`` int32 ``[I·b/32, O]``, ``scales`` ``[G, O]``, ``qzeros`` int32 ``[G, O·b/32]`` and
``g_idx`` ``[I]``. Words are a stream of bits, the lowest first: 32 integers of 3 bits fill 3
words. Zero points are stored less 1, modulo ``2^b``, unless ``checkpoint_format`` is ``gptq_v2``.
``g_idx`` names the group of each column; without ``desc_act`` it counts 0, 0, …, 1, 1, ….
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers.form import StoredWeight
from vllm_moe_compat.checkpoint.numbers.int_settings import AUTO_ROUND, IntConfig, IntSettings
from vllm_moe_compat.checkpoint.numbers.ints import (
    Candidate,
    Contradiction,
    IntForm,
    Parts,
    expect,
    float_name,
)
from vllm_moe_compat.checkpoint.numbers.ints_op import (
    COLUMN_WORDS,
    ORDER,
    SCALE,
    ZERO,
    DequantizeInts,
)
from vllm_moe_compat.dtypes import FLOATS
from vllm_moe_compat.errors import UnsupportedCheckpointError

_ENDINGS = {SCALE: "scales", ZERO: "qzeros", ORDER: "g_idx"}
QWEIGHT = "qweight"


def packed_weights(
    tensors: Mapping[str, TensorInfo], config: IntConfig, packing: str
) -> Iterator[Candidate]:
    """Yield the weights under ``qweight`` that are packed as ``gptq`` or as ``awq``.

    The scales' shape tells: ``[G, O]`` beside ``[…, O]`` or beside ``[…, O/8]``. Without scales
    the config tells.
    """
    for name, info in tensors.items():
        if not name.endswith(QWEIGHT) or info.dtype != "I32" or len(info.shape) < 2:
            continue
        base = name.removesuffix(QWEIGHT)
        scales = tensors.get(f"{base}scales")
        if scales is not None and scales.shape:
            found = "gptq" if scales.shape[-1] == info.shape[-1] else "awq"
        else:
            found = config.packing or "gptq"
        if found == packing:
            parts = tuple((r, base + e) for r, e in _ENDINGS.items() if base + e in tensors)
            weight = float_name(f"{base}weight", tensors, QWEIGHT)
            yield Candidate(weight, StoredWeight(name, parts))


def check_packing(config: IntConfig, packing: str) -> None:
    """Check that the config names the packing that the tensors have.

    Raises:
        Contradiction: it names the other.
    """
    if config.packing not in ("", packing):
        raise Contradiction(
            "weight",
            f"is packed as {packing}, and config.json says {config.packing}",
            "one packing in both",
        )


def width(parts: Parts, rows: int, settings: IntSettings) -> int:
    """Return the bits of an integer, by the zero points if there are any.

    Raises:
        Contradiction: tensors and config name different widths, or none.
    """
    bits = settings.bits
    if ZERO in parts:
        words = parts[ZERO].shape[-1] if parts[ZERO].shape else 0
        found, rest = divmod(32 * words, max(rows, 1))
        if rest or bits not in (None, found):
            expected = f"{rows * bits // 32} words for {bits} bits" if bits else "whole integers"
            shape = list(parts[ZERO].shape)
            raise Contradiction(ZERO, f"has the shape {shape} beside {rows:,} rows", expected)
        return found
    if settings.symmetric and bits is not None:
        return bits
    raise Contradiction("weight", "has no qzeros", "zero points beside it")


def columns_per_scale(parts: Parts, columns: int, rows: int, settings: IntSettings) -> int:
    """Return the columns under one scale, as scales and config agree.

    Raises:
        Contradiction: they do not.
    """
    *lead, _, _ = parts["weight"].shape
    groups = parts[SCALE].shape[-2] if len(parts[SCALE].shape) > 1 else 1
    group = settings.group
    if group is None:
        group = columns // groups if groups and columns % groups == 0 else columns
    group = group or columns
    expect(parts, SCALE, (*lead, -(-columns // group), rows), FLOATS)
    return min(group, columns)


class Gptq(IntForm):
    """Integers in words along the columns."""

    name = "gptq"
    title = "GPTQ"
    methods = frozenset({"gptq", *AUTO_ROUND})
    dtypes = frozenset({"I32"})
    zero_biases = True

    def candidates(
        self, tensors: Mapping[str, TensorInfo], config: IntConfig
    ) -> Iterator[Candidate]:
        """Yield every ``qweight`` packed along ``I``."""
        return packed_weights(tensors, config, "gptq")

    def operation(
        self, parts: Parts, settings: IntSettings | None, config: IntConfig
    ) -> DequantizeInts:
        """Return the operation, with the width that the zero points have."""
        if SCALE not in parts:
            raise Contradiction("weight", "has no scales", "scales beside it")
        check_packing(config, "gptq")
        settings = settings or IntSettings()
        *lead, words, rows = parts["weight"].shape
        bits = width(parts, rows, settings)
        if bits not in (2, 3, 4, 8):
            found = f"has integers of {bits} bits"
            raise Contradiction("weight", found, "2, 3, 4 or 8 bits", UnsupportedCheckpointError)
        columns, rest = divmod(32 * words, bits)
        if rest:
            found = f"has {words:,} words along its columns"
            raise Contradiction("weight", found, f"whole integers of {bits} bits")
        group = columns_per_scale(parts, columns, rows, settings)
        if ZERO in parts:
            groups = -(-columns // group)
            expect(parts, ZERO, (*lead, groups, rows * bits // 32), ("I32",))
        if ORDER in parts:
            expect(parts, ORDER, (*lead, columns), ("I32", "I64"))
        elif settings.act_order and group < columns:
            raise Contradiction("weight", "has no g_idx", "one, as desc_act is set")
        return DequantizeInts(
            COLUMN_WORDS,
            bits,
            columns,
            group,
            f"GPTQ int{bits}",
            parts[SCALE].dtype,
            symmetric=bool(settings.symmetric),
            minus_one=config.minus_one,
            act_order=ORDER in parts and settings.act_order is not False and group < columns,
        )


FORM = Gptq()
