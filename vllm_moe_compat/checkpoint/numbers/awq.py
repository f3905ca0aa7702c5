"""AWQ (``version: gemm``), and AutoRound in AWQ's packing: integers of 4 bits along ``O``.

``qweight`` int32 ``[I, O/8]`` and ``qzeros`` int32 ``[G, O/8]`` hold 8 rows in a word, in the order
0 2 4 6 1 3 5 7 from the lowest bits; ``scales`` is ``[G, O]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_moe_compat.checkpoint.headers import TensorInfo
from vllm_moe_compat.checkpoint.numbers.gptq import (
    check_packing,
    columns_per_scale,
    packed_weights,
    width,
)
from vllm_moe_compat.checkpoint.numbers.int_settings import AUTO_ROUND, IntConfig, IntSettings
from vllm_moe_compat.checkpoint.numbers.ints import Candidate, Contradiction, IntForm, Parts, expect
from vllm_moe_compat.checkpoint.numbers.ints_op import AWQ_WORDS, SCALE, ZERO, DequantizeInts
from vllm_moe_compat.errors import UnsupportedCheckpointError


class Awq(IntForm):
    """Integers in words along the rows of the output."""

    name = "awq"
    title = "AWQ"
    methods = frozenset({"awq", *AUTO_ROUND})
    dtypes = frozenset({"I32"})
    misread_upstream = "it rounds zero points to the half precision of the scales"

    def candidates(
        self, tensors: Mapping[str, TensorInfo], config: IntConfig
    ) -> Iterator[Candidate]:
        """Yield every ``qweight`` packed along ``O``."""
        return packed_weights(tensors, config, "awq")

    def operation(
        self, parts: Parts, settings: IntSettings | None, config: IntConfig
    ) -> DequantizeInts:
        """Return the operation."""
        if SCALE not in parts:
            raise Contradiction("weight", "has no scales", "scales beside it")
        check_packing(config, "awq")
        settings = settings or IntSettings()
        *lead, columns, words = parts["weight"].shape
        rows = parts[SCALE].shape[-1] if parts[SCALE].shape else 0
        bits = width(parts, rows, settings)
        if bits != 4:
            found = f"has integers of {bits} bits"
            raise Contradiction("weight", found, "4 bits", UnsupportedCheckpointError)
        if words * 8 != rows:
            found = f"has {words * 8:,} rows beside scales for {rows:,}"
            raise Contradiction("weight", found, "as many rows as scales")
        group = columns_per_scale(parts, columns, rows, settings)
        if ZERO in parts:
            expect(parts, ZERO, (*lead, -(-columns // group), words), ("I32",))
        return DequantizeInts(
            AWQ_WORDS,
            bits,
            columns,
            group,
            "AWQ int4",
            parts[SCALE].dtype,
            symmetric=bool(settings.symmetric),
        )


FORM = Awq()
