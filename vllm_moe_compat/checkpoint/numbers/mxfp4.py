"""MXFP4: E2M1 pairs with one power of two for each group of 32 columns.

The scale is an exponent byte (E8M0), ``U8`` in older files. compressed-tensors writes
``weight_packed`` and ``weight_scale``, Quark ``weight`` and ``weight_scale``, DeepSeek's newest
releases ``weight`` as ``I8`` and ``scale``. gpt-oss has names and an order of its own
(``…_blocks``), which its module reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vllm_moe_compat.checkpoint.numbers.fp4 import Fp4
from vllm_moe_compat.checkpoint.numbers.fp4_ops import MXFP4


class MxFp4(Fp4):
    """E2M1 pairs with E8M0 scales."""

    name = MXFP4
    title = "MXFP4"
    faults: Mapping[str, str] = MappingProxyType(
        {"scales": "an MXFP4 weight whose scale does not fit"}
    )
    methods = frozenset({"compressed-tensors", "fp8", "modelopt", "quark", "mxfp4"})
    scales = frozenset({"F8_E8M0", "U8"})


FORM = MxFp4()
