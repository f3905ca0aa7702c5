"""What a checkpoint is, found from its config and its tensors' names, shapes and dtypes.

Nothing here reads a tensor's values or knows a model family. ``headers`` reads
the files, ``detect`` says what they hold; both are pure enough to run over a
checkpoint of hundreds of gigabytes in about a second.
"""

from __future__ import annotations

from vllm_moe_compat.layout.detect import Layout, detect
from vllm_moe_compat.layout.experts import ExpertBlock, is_transposed
from vllm_moe_compat.layout.extras import DEFAULT_EXTRAS, Extras
from vllm_moe_compat.layout.headers import TensorInfo, read_headers
from vllm_moe_compat.layout.index import check_index
from vllm_moe_compat.layout.names import fold
from vllm_moe_compat.layout.quantization import Fp8Tensors, infer_fp8

__all__ = [
    "DEFAULT_EXTRAS",
    "ExpertBlock",
    "Extras",
    "Fp8Tensors",
    "Layout",
    "TensorInfo",
    "check_index",
    "detect",
    "fold",
    "infer_fp8",
    "is_transposed",
    "read_headers",
]
