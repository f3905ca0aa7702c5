"""The setting of the expert cache, and how it is divided over the layers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_compat import envs
from vllm_moe_compat.errors import InsufficientMemoryError, SettingError
from vllm_moe_compat.plan.expert_cache import (
    CacheSetting,
    ExpertLayer,
    divide,
    parse,
    size_setting,
)

NAME = envs.EXPERT_CACHE.name


def layers(*experts: int, each: int = 1000) -> list[ExpertLayer]:
    return [ExpertLayer(f"layers.{n}", count, count * each) for n, count in enumerate(experts)]


# --- the value ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "share", "nbytes"),
    [
        ("25%", Fraction(1, 4), None),
        ("12.5 %", Fraction(1, 8), None),
        ("100%", Fraction(1), None),
        ("8GiB", None, 8 << 30),
        ("800MiB", None, 800 << 20),
        ("1.5GiB", None, 3 << 29),
        ("1.5 gib", None, 3 << 29),
        ("3GB", None, 3 * 10**9),
        ("64KiB", None, 64 << 10),
        ("1TiB", None, 1 << 40),
    ],
)
def test_a_share_and_a_size(value, share, nbytes, monkeypatch):
    monkeypatch.setenv(NAME, value)
    setting = CacheSetting.read()
    assert setting is not None
    assert (setting.share, setting.nbytes, setting.words) == (share, nbytes, value)


@pytest.mark.parametrize("value", ["off", "OFF", "", "  "])
def test_off_is_the_default(value, monkeypatch):
    monkeypatch.setenv(NAME, value)
    assert CacheSetting.read() is None
    monkeypatch.delenv(NAME)
    assert CacheSetting.read() is None


@pytest.mark.parametrize(
    "value",
    [
        *("on", "8", "0.25", "-25%", "+1GiB", "GiB", "%", "8 G", "8GiB/s", "1e3MiB", "nan%"),
        *("8,5GiB", "8GiB 25%", "٢٥%", "0x10MiB", "9" * 5000 + "MiB", "25%%", "1.GiB", "8iB"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(value):
    with pytest.raises(SettingError) as error:
        parse(value)
    text = str(error.value)
    assert text.startswith(f"{NAME}={value!r} is not a valid value; set it to off, ")
    assert text.endswith(".")
    assert "\n" not in text


# --- the division ------------------------------------------------------------


def test_a_share_gives_every_layer_that_share_of_its_experts():
    plan = divide(layers(64, 64, 64), 8, CacheSetting("25%", share=Fraction(1, 4)))
    assert plan.slots == (16, 16, 16)
    assert (plan.nbytes, plan.least, plan.full) == (48_000, 24_000, 192_000)
    assert not plan.all_resident


def test_the_rest_of_a_size_goes_to_the_first_layers():
    plan = divide(layers(64, 64, 64), 8, CacheSetting("50.5 kB", nbytes=50_500))
    assert plan.slots == (17, 17, 16)
    assert plan.nbytes == 50_000


def test_a_size_for_all_experts_and_more_keeps_them_all():
    for setting in (CacheSetting("100%", share=Fraction(1)), CacheSetting("1TiB", nbytes=1 << 40)):
        plan = divide(layers(64, 32), 8, setting)
        assert plan.slots == (64, 32)
        assert plan.all_resident
        assert plan.share == 1
        assert plan.read_per_pass(4096) == 0


def test_the_smallest_cache_holds_the_experts_of_one_token():
    plan = divide(layers(64, 4), 8, CacheSetting("12 kB", nbytes=12_000))
    assert plan.slots == (8, 4)  # A layer has no more slots than experts.
    with pytest.raises(InsufficientMemoryError) as error:
        divide(layers(64, 4), 8, CacheSetting("11.9 kB", nbytes=11_900))
    assert str(error.value) == (
        f"{NAME}=11.9 kB is less than the 8 experts that one token needs in each of 2 layers "
        "take; set it to at least 12KiB, or 17.7%."
    )


@pytest.mark.parametrize("value", ["0%", "0GiB", "0.1%"])
def test_no_cache_at_all_is_refused_with_the_smallest_that_works(value):
    setting = parse(value)
    assert setting is not None
    with pytest.raises(InsufficientMemoryError, match=r"at least 32KiB, or 12.5%\.$"):
        divide(layers(64, 64, each=2048), 8, setting)


def test_without_experts_nothing_is_divided():
    plan = divide([], 8, CacheSetting("25%", share=Fraction(1, 4)))
    assert plan.slots == ()
    assert plan.all_resident


_LAYER = st.builds(
    lambda experts, each: (experts, each), st.integers(1, 300), st.integers(1, 10_000_000)
)


@given(st.lists(_LAYER, min_size=1, max_size=70), st.integers(1, 16), st.fractions(0, 1))
def test_no_division_exceeds_the_size_or_starves_a_layer(shapes, per_token, part):
    found = [ExpertLayer(str(n), e, e * size) for n, (e, size) in enumerate(shapes)]
    full = sum(layer.nbytes for layer in found)
    least = sum(min(per_token, e) * size for e, size in shapes)
    budget = least + int((full - least) * part)
    plan = divide(found, per_token, CacheSetting("", nbytes=budget))
    assert plan.nbytes <= budget
    for slots, layer in zip(plan.slots, found, strict=True):
        assert min(per_token, layer.experts) <= slots <= layer.experts
    # Nothing that would fit is left unused.
    rest = budget - plan.nbytes
    unused = [
        layer.expert_bytes
        for slots, layer in zip(plan.slots, found, strict=True)
        if slots < layer.experts
    ]
    assert not unused or rest < max(unused) * (len(unused) + 1)
    # The advice of the refusal is a size that works.
    advised = parse(size_setting(least))
    assert advised is not None
    assert divide(found, per_token, advised).nbytes >= least


# --- reads of a pass ---------------------------------------------------------


def test_a_pass_reads_at_most_what_its_tokens_need_and_what_has_no_slot():
    found = [ExpertLayer("a", 64, 64_000, stored=16_000), ExpertLayer("b", 4, 4_000)]
    plan = divide(found, 2, CacheSetting("20 kB", nbytes=20_000))
    assert plan.slots == (18, 2)
    assert plan.misses_per_pass(1) == 2 + 2
    assert plan.misses_per_pass(10) == 20 + 2
    assert plan.misses_per_pass(1000) == 46 + 2
    # Stored bytes: 250 for an expert of the first layer, 1,000 in the second.
    assert plan.read_per_pass(1000) == 46 * 250 + 2 * 1000
