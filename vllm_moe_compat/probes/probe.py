"""Probe one form of checkpoint, without the hooks and with them.

A tiny checkpoint of the form is written to a folder and loaded twice through mlx-lm's
``load_model``, once with the hooks switched off and once with them. The logits are compared
with recorded ones. The probe does not affect other threads, and the process's last load
report stays.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_moe_compat import envs
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.installed import OLDER
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.log import silence
from vllm_moe_compat.probes.recipes import TOKENS, Family, Recipe
from vllm_moe_compat.probes.results import FAILS, REFUSED, RIGHT, WRONG, Probe, Verdict
from vllm_moe_compat.probes.variants import write

TOLERANCE = 1e-4
"""Tolerance relative to the largest logit; rounding to bfloat16 exceeds it ten times."""


def probe(family: Family, row: Row, form: str, *, patched: bool) -> Probe | None:
    """Load the form without the hooks and, if ``patched``, with them.

    Args:
        family: a recorded family of the row's module.
        row: the module's row.
        form: a key of ``variants.FORMS``.
        patched: whether to load with the hooks, too.

    Returns:
        The results; None where the family has no such form, or the installed module cannot have it.
    """
    with tempfile.TemporaryDirectory(prefix="moe-compat-probe-") as name, _isolated():
        folder = Path(name)
        try:
            recipe = write(folder, family, row, form)
        except UnsupportedCheckpointError:
            recipe = None  # The installed module is older than the record.
        if recipe is None:
            return None
        with loading_with(hooks=False):
            upstream = judge(folder, recipe)
        ours = judge(folder, recipe) if patched else None
    older = any(old.is_lacking for old in OLDER if row.module.endswith(f".{old.module}"))
    if older and ours is not None and UnsupportedCheckpointError.__name__ in ours.why:
        return None  # What it lacks, and nothing can make up for, is refused by name.
    return Probe(family.name, form, family.oracle, upstream, ours)


def judge(folder: Path, recipe: Recipe) -> Verdict:
    """Load the folder and compare the logits with the recipe's."""
    import mlx.core as mx
    import mlx_lm.utils
    import numpy as np

    # On the CPU: Metal computes float32 matrix products with lower precision.
    with mx.stream(mx.cpu):
        try:
            model, _ = mlx_lm.utils.load_model(folder)
        except Exception as error:  # noqa: BLE001 - mlx-lm may raise anything
            return Verdict(REFUSED, f"{type(error).__name__}: {' '.join(str(error).split())}")
        model.set_dtype(mx.float32)
        try:
            found = np.array(model(mx.array([TOKENS]))[0])
        except Exception as error:  # noqa: BLE001 - mlx-lm may raise anything
            return Verdict(FAILS, f"{type(error).__name__}: {' '.join(str(error).split())}")
    distance = recipe.distance(found)
    if distance < TOLERANCE:
        return Verdict(RIGHT, distance=distance)
    return Verdict(WRONG, f"logits are off by {distance:.1e} of the largest", distance)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Load in float32 whatever the settings are, without logs and load reports."""
    settings = {v.name: v.default for v in (envs.DTYPE, envs.QUANTIZE, envs.EXPERT_CACHE)}
    with envs.override(settings), loading_with(dtype="float32", record=False), silence():
        yield
