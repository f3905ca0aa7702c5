"""Loading a cell through the real mlx-lm, and judging what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm.utils
import numpy as np

import vllm_moe_compat
from parity.reference import TOKENS, Reference


class Verdict(NamedTuple):
    """``right``, ``wrong`` or ``refused``; how far off; the words of a refusal."""

    word: str
    distance: float | None
    why: str


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """Without the plugin inside, with it again outside."""
    vllm_moe_compat.revert()
    try:
        yield
    finally:
        vllm_moe_compat.apply()


def judge(folder: Path, reference: Reference, tolerance: float) -> Verdict:
    """Load the folder and compare the logits."""
    try:
        model, _ = mlx_lm.utils.load_model(folder)
    except Exception as error:  # noqa: BLE001 - stock refuses with whatever broke
        return Verdict("refused", None, f"{type(error).__name__}: {error}")
    return compare(model, reference, tolerance)


def compare(model: Any, reference: Reference, tolerance: float) -> Verdict:
    model.set_dtype(mx.float32)
    try:
        found = np.array(model(mx.array([TOKENS]))[0])
    except Exception as error:  # noqa: BLE001
        return Verdict("wrong", None, f"fails when run: {type(error).__name__}: {error}")
    distance = reference.distance(found)
    return Verdict("right" if distance < tolerance else "wrong", distance, "")
