"""A real checkpoint through mlx-lm alone: complete, floating, finite, repeatable."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vllm_moe_compat
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.load.report import LoadReport, last_report

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(3600)]

TOKENS = 24


@dataclass
class Loaded:
    model: Any
    tokenizer: Any
    report: LoadReport | None

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        steps = generate_step(mx.array(prompt), self.model, max_tokens=count)
        return [int(token) for token, _ in steps]


@pytest.fixture(scope="module")
def loaded(smoke_model: Path) -> Iterator[Loaded]:
    """The model by mlx-lm's own strict load; its memory is free again after this module."""
    import mlx.core as mx
    import mlx_lm

    with vllm_moe_compat.applied():
        model, tokenizer = mlx_lm.load(str(smoke_model))
        yield Loaded(model, tokenizer, last_report())
    del model, tokenizer
    gc.collect()
    mx.clear_cache()


def test_the_load_went_through_a_plan(loaded: Loaded, smoke_model: Path) -> None:
    assert loaded.report is not None, (
        f"{type(loaded.model).__module__} has no row, so mlx-lm loaded this checkpoint by itself"
    )
    assert Path(str(loaded.report.path)) == smoke_model
    assert loaded.report.module in TRANSFORMS_BY_MODULE


def test_every_parameter_floats_or_is_packed_beside_its_scales(loaded: Loaded) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    parameters = dict(tree_flatten(loaded.model.parameters()))
    assert parameters
    odd = []
    for name, array in parameters.items():
        packed = f"{name.removesuffix('weight')}scales" in parameters
        if not mx.issubdtype(array.dtype, mx.floating) and not packed:
            odd.append(f"{name}: {array.dtype}")
    assert not odd


def test_every_parameter_is_finite(loaded: Loaded) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    # One at a time: the whole model's masks would take half its memory again.
    assert not [
        name
        for name, array in tree_flatten(loaded.model.parameters())
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item()
    ]


def test_logits_are_finite_and_depend_on_the_prompt(loaded: Loaded) -> None:
    import mlx.core as mx

    first, second = (
        loaded.model(mx.array([prompt]))[0, -1].astype(mx.float32)
        for prompt in ([1, 2, 3, 4], [9, 8, 7, 6])
    )
    assert mx.isfinite(first).all().item()
    assert mx.isfinite(second).all().item()
    assert not mx.allclose(first, second).item()


def test_greedy_generation_repeats_itself(loaded: Loaded) -> None:
    prompt = loaded.tokenizer.encode("The first rule is")
    assert loaded.greedy(prompt, TOKENS) == loaded.greedy(prompt, TOKENS)


def test_golden_text(loaded: Loaded, golden: dict[str, Any]) -> None:
    prompt = loaded.tokenizer.encode(golden["prompt"])
    tokens = loaded.greedy(prompt, golden["max_tokens"])
    # Decoded behind the prompt: some tokenizers drop a leading space.
    text = loaded.tokenizer.decode(prompt + tokens)
    assert text.removeprefix(loaded.tokenizer.decode(prompt)) == golden["text"]
