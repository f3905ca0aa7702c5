"""mlx-vlm loads by itself: with our hooks in place it behaves as without.

It has models, a loader and ``sanitize`` functions of its own and imports nothing of mlx-lm. The
lane of vllm-metal's pins installs it; elsewhere these tests are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
import torch
import transformers

import vllm_moe_compat
from parity.families import FAMILIES
from parity.forms import FORM_BY_NAME, build
from support.loading import load, parameters, same_bits
from vllm_moe_compat.load.context import current

pytestmark = pytest.mark.needs("mlx_vlm/utils.py", "def load_model")
LOADED = [
    ("qwen3_5_moe", "release"),
    ("qwen3_5_moe", "saved"),
    ("qwen3_5", "release"),
    ("mistral3", "release"),
]
REFUSED = [("qwen3_5_moe", "block FP8 128"), ("qwen3_5", "block FP8")]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    vllm_moe_compat.revert()
    yield
    vllm_moe_compat.revert()


def outcome(path: Path) -> dict[str, mx.array] | str:
    """Return the parameters of mlx-vlm's model, vision tower included, or the refusal."""
    import mlx_vlm.utils

    try:
        return parameters(mlx_vlm.utils.load_model(path))
    except Exception as error:  # noqa: BLE001 - it refuses with anything
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(("family", "form"), LOADED)
def test_what_it_loads_is_the_same_bit_for_bit(family: str, form: str, tmp_path: Path):
    path = build(FAMILIES[family], FORM_BY_NAME[form]).write(tmp_path)
    alone = outcome(path)
    assert not isinstance(alone, str), alone
    assert any("vision" in name for name in alone)
    vllm_moe_compat.apply()
    found = outcome(path)
    assert not isinstance(found, str), found
    assert same_bits(found, alone)
    # A load of ours before it leaves nothing behind that it would meet.
    load(path)
    again = outcome(path)
    assert not isinstance(again, str), again
    assert same_bits(again, alone)
    assert current.get() is None


@pytest.mark.parametrize(("family", "form"), REFUSED)
def test_what_it_refuses_it_refuses_with_the_same_words(family: str, form: str, tmp_path: Path):
    path = build(FAMILIES[family], FORM_BY_NAME[form]).write(tmp_path)
    alone = outcome(path)
    assert isinstance(alone, str)
    vllm_moe_compat.apply()
    assert outcome(path) == alone
