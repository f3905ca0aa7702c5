"""Whether a module gets a form of checkpoint right, by itself and with this package.

A tiny checkpoint of the form is written to a folder and loaded twice through mlx-lm's own
``load_model``: once with our hooks standing aside, which is what upstream does, once as
they are. The logits are compared with recorded ones. Nothing that the process serves or
reports is touched: hooks stand aside for the probing thread only.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_moe_compat import envs
from vllm_moe_compat.families.row import Row
from vllm_moe_compat.load import context as loads
from vllm_moe_compat.log import silence
from vllm_moe_compat.probes.recipes import TOKENS, Family, Recipe
from vllm_moe_compat.probes.results import FAILS, REFUSED, RIGHT, WRONG, Probe, Verdict
from vllm_moe_compat.probes.variants import write

TOLERANCE = 1e-4
"""Of the largest logit. What is merely rounded to bfloat16 is off by ten times that."""


def probe(family: Family, row: Row, form: str, *, patched: bool) -> Probe | None:
    """Feed the form to upstream's class and, if asked, to ours.

    Args:
        family: a recorded family of the row's module.
        row: of the module.
        form: a key of ``forms.FORMS``.
        patched: whether to load with the hooks, too.

    Returns:
        What came out; None where the family does not come in the form.
    """
    with tempfile.TemporaryDirectory(prefix="moe-compat-probe-") as name, _apart():
        folder = Path(name)
        recipe = write(folder, family, row, form)
        if recipe is None:
            return None
        with loads.standing_aside():
            upstream = judge(folder, recipe)
        ours = judge(folder, recipe) if patched else None
    return Probe(family.name, form, family.oracle, upstream, ours)


def judge(folder: Path, recipe: Recipe) -> Verdict:
    """Load the folder and compare the logits with the recipe's."""
    import mlx.core as mx
    import mlx_lm.utils
    import numpy as np

    # On the CPU, where float32 is float32 and no kernel of Metal's is needed.
    with mx.stream(mx.cpu):
        try:
            model, _ = mlx_lm.utils.load_model(folder)
        except Exception as error:  # noqa: BLE001 - upstream refuses with whatever broke
            return Verdict(REFUSED, f"{type(error).__name__}: {' '.join(str(error).split())}")
        model.set_dtype(mx.float32)
        try:
            found = np.array(model(mx.array([TOKENS]))[0])
        except Exception as error:  # noqa: BLE001 - likewise
            return Verdict(FAILS, f"{type(error).__name__}: {' '.join(str(error).split())}")
    distance = recipe.distance(found)
    if distance < TOLERANCE:
        return Verdict(RIGHT, distance=distance)
    return Verdict(WRONG, f"logits are off by {distance:.1e} of the largest", distance)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Load in float32 inside, whatever the settings; log and report nothing."""
    settings = {envs.DTYPE.name: "auto", envs.QUANTIZE.name: "none"}
    with envs.override(settings), loads.serving_dtype_as("float32"), loads.unseen(), silence():
        yield
