from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_compat.checkpoint.names import fold, fold_numbers


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [([3], "3"), ([0, 1, 2], "0…2"), ([5, 0, 2, 1], "0…2,5"), ([1, 3], "1,3"), ([], "")],
)
def test_numbers_become_runs(numbers: list[int], wanted: str):
    assert fold_numbers(numbers) == wanted


def test_layers_and_experts_fold():
    names = [f"layers.{n}.experts.{e}.w" for n in range(40) for e in range(256)]
    assert fold(names) == "layers.0…39.experts.0…255.w"


def test_names_that_are_no_full_grid_are_listed():
    assert fold(["layers.0.experts.3.w", "layers.1.experts.5.w"]) == (
        "layers.0.experts.3.w, layers.1.experts.5.w"
    )


def test_at_most_three_patterns_are_shown():
    names = [f"{letter}.{n}" for letter in "abcde" for n in range(3)]
    assert fold(names) == "a.0…2, b.0…2, c.0…2 and 6 more"


def test_numbers_that_are_part_of_a_word_stay():
    assert fold(["blocks.0.fc1.w", "blocks.1.fc1.w"]) == "blocks.0…1.fc1.w"


@given(st.lists(st.text(max_size=30), max_size=8))
def test_any_names_give_one_printable_line(names: list[str]):
    folded = fold(names)
    assert all(c.isprintable() for c in folded)


@given(st.text(max_size=20), st.sets(st.integers(0, 50), min_size=1))
def test_one_pattern_is_never_listed(stem: str, numbers: set[int]):
    assert " more" not in fold(f"x.{n}.y" for n in numbers)
