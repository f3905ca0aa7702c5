"""States after every token of one pass are those that passes of one token leave, bit for bit."""

from __future__ import annotations

import gc
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support import hybrid, state_families
from support.state_families import Caches, step_by_step
from vllm_moe_compat.backend.model import state_trial
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.model.recording_cache import CURRENT, UnrecordedStateError
from vllm_moe_compat.backend.model.state_recording import StateRecording
from vllm_moe_compat.backend.pages.states_by_position import StatesByPosition, Steps
from vllm_moe_compat.families.fixes.delta_norms import DELTA_NORMS

PROMPT = 5


def tokens_of(rows: int, count: int) -> Any:
    return np.random.default_rng(count).integers(1, 90, (rows, PROMPT + count))


def recorded(
    model: Any, caches: Caches, tokens: Any, lengths: list[int], recording: StateRecording
) -> list[StatesByPosition]:
    """One pass over rows of these lengths, padded on the right."""
    padded = np.array(tokens)
    for row, length in enumerate(lengths):
        padded[row, length:] = padded[row, 0]
    with_state = recording.caches(caches.states, np.asarray(lengths))
    with recording.during():
        logits = model(mx.array(padded), cache=caches.replaced(with_state))
    found = recording.by_position(with_state)
    mx.eval(logits, [layer.held for layer in found])
    return found


def differences(
    model: Any, recording: StateRecording, lengths: list[int], *, begun: bool
) -> list[Any]:
    """Return (row, tokens, layer, array) of every state that differs in a bit."""
    tokens = tokens_of(len(lengths), max(lengths))
    layers = describe(model)
    ours, theirs = Caches(model), Caches(model)
    for caches in (ours, theirs):
        caches.begin(layers, len(lengths))
        if begun:
            mx.eval(model(mx.array(tokens[:, :PROMPT]), cache=caches.made), caches.states)
    expected = step_by_step(model, theirs, mx.array(tokens[:, PROMPT:]))
    found = recorded(model, ours, tokens[:, PROMPT:], lengths, recording)
    return [
        (row, count, layer, index)
        for row, length in enumerate(lengths)
        for count in range(1, length + 1)
        for layer, states in enumerate(found)
        for index, part in enumerate(states.after([row], [count]))
        if not same_bits(part[0], expected[count - 1][layer][index][row])
    ]


def same_bits(one: mx.array, other: mx.array) -> bool:
    return one.dtype == other.dtype and bool(mx.array_equal(one, other).item())


@pytest.mark.parametrize("name", state_families.NAMES)
def test_states_after_every_token_are_those_of_passes_of_one_token(name: str) -> None:
    model = state_families.build(name)
    recording = StateRecording(model)
    assert recording.unsupported == ""
    assert differences(model, recording, [4, 2, 3], begun=True) == []
    assert differences(model, recording, [3], begun=False) == []


@pytest.mark.full
@pytest.mark.parametrize("name", state_families.NAMES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_states_are_those_of_passes_of_one_token_at_every_width(name: str, dtype: mx.Dtype) -> None:
    model = state_families.build(name, dtype)
    recording = StateRecording(model)
    for width in range(1, 10):
        for begun in (False, True):
            assert differences(model, recording, [width], begun=begun) == []
            ragged = [max(1, width - 3), width, 1, max(1, width // 2)]
            assert differences(model, recording, ragged, begun=begun) == []


def test_a_corrected_layer_with_globals_of_its_own_is_recorded() -> None:
    model = state_families.build("qwen3_next")
    plain = {type(part) for part in model.modules()}
    DELTA_NORMS.apply(model, {})
    corrected = {type(part) for part in model.modules()} - plain
    assert any(isinstance(vars(kind)["__call__"], FunctionType) for kind in corrected)
    recording = StateRecording(model)
    assert differences(model, recording, [4, 2], begun=True) == []


def hooked(model: Any) -> list[Any]:
    """Everything that a recording replaces: classes of instances, functions of modules."""
    from mlx_lm.models import qwen3_5

    return [type(part) for part in model.modules()] + [qwen3_5.gated_delta_update, CURRENT.get()]


def test_nothing_is_hooked_outside_of_recorded_passes() -> None:
    model, other = hybrid.model(), hybrid.model(1)
    before = hooked(model), hooked(other)
    recording, others = StateRecording(model), StateRecording(other)
    assert (hooked(model), hooked(other)) == before
    during: list[Any] = []

    def stop() -> None:
        with recording.during(), others.during():
            during.append(hooked(model))
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop()
    assert during != [before[0]]
    assert (hooked(model), hooked(other)) == before


def test_a_pass_inside_on_other_caches_is_not_recorded() -> None:
    """It has the bits of mlx-lm's own recurrence over all tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    model = state_families.build("granitemoehybrid")
    tokens = mx.array(tokens_of(2, 4))
    own = model(tokens, cache=make_prompt_cache(model))
    mx.eval(own)
    recording = StateRecording(model)
    with recording.during():
        inside = model(tokens, cache=make_prompt_cache(model))
    assert same_bits(inside, own)


def test_a_pass_of_one_token_needs_no_hook() -> None:
    model = state_families.build("kimi_linear")
    assert differences(model, StateRecording(model), [1, 1], begun=True) == []


class Shifted(StateRecording):
    """A recording whose states are those after the token before."""

    def by_position(self, caches: Any) -> list[StatesByPosition]:
        found = super().by_position(caches)
        for layer in found:
            for part in layer.parts:
                held = part.held()
                if len(held) > 1:
                    held[-1] = held[-2]
                    object.__setattr__(part, "arrays", tuple(held))
        return found


class Swapped(StateRecording):
    """A recording that takes one convolution's state for another's."""

    def by_position(self, caches: Any) -> list[StatesByPosition]:
        found = super().by_position(caches)
        return [StatesByPosition((s.parts[1], s.parts[0], *s.parts[2:])) for s in found]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("kind", "array"), [(Shifted, 3), (Swapped, 0)])
def test_the_trial_notices_states_of_something_else(kind: Any, array: int, dtype: mx.Dtype) -> None:
    model = state_families.build("kimi_linear", dtype)
    assert StateRecording(model).unsupported == ""
    assert kind(model).unsupported.startswith(f"array {array} of state 0, (")
    assert "differs from that of a pass of one token by" in kind(model).unsupported


def test_the_trial_notices_the_state_of_another_token_where_tokens_change_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state_trial, "PROMPT", 60)
    model = state_families.build("bailing_moe_linear", mx.bfloat16)
    assert StateRecording(model).unsupported == ""
    found = Shifted(model).unsupported
    assert float(found.split(" by ")[1].split()[0]) < state_trial.TOLERANCE[mx.bfloat16]


class Larger(StateRecording):
    """A recording whose states are too large."""

    def by_position(self, caches: Any) -> list[StatesByPosition]:
        return [
            StatesByPosition(tuple(Steps(tuple(1.4 * x for x in p.arrays)) for p in layer.parts))
            for layer in super().by_position(caches)
        ]


def test_the_trial_notices_states_that_are_only_closest_to_the_right_ones() -> None:
    model = state_families.build("bailing_moe_linear", mx.bfloat16)
    assert "of a pass of one token by 0.4 " in Larger(model).unsupported


def test_states_of_unknown_code_are_found_out_by_trying() -> None:
    """Mamba without experts has a scan of its own, which nobody serves."""
    from mlx_lm.models.mamba import Model, ModelArgs

    model = Model(
        ModelArgs(
            model_type="mamba",
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            state_size=4,
            num_hidden_layers=2,
            conv_kernel=4,
            use_bias=False,
            use_conv_bias=True,
            time_step_rank=4,
        )
    )
    recording = StateRecording(model)
    assert recording.unsupported == (
        "array 1 of 2 of a state, (64, 4) mlx.core.float32, does not come from a recurrence or a "
        "convolution that is known"
    )
    caches = Caches(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=caches.made))
    with pytest.raises(UnrecordedStateError, match="array 1 of 2"):
        recorded(model, caches, tokens_of(1, 3), [8], recording)


def test_other_tokens_are_tried_where_some_have_no_finite_logits() -> None:
    model = hybrid.model()
    table = model.language_model.model.embed_tokens
    table.weight[2] = mx.array(np.nan)
    assert StateRecording(model).unsupported == ""
    table.weight[:] = mx.array(np.nan)
    assert StateRecording(model).unsupported == (
        "the logits of all tokens that were tried are NaN or infinite"
    )


def test_a_model_without_states_needs_no_trial() -> None:
    class Silent(nn.Module):
        layers = ()

        def make_cache(self) -> list[Any]:
            return []

    assert state_trial.failure(Silent(), StateRecording(Silent())) == ""


def test_a_recorded_pass_leaves_nothing_behind() -> None:
    model = hybrid.model()
    recording, caches = StateRecording(model), Caches(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=caches.made), caches.states)
    recorded(model, caches, tokens_of(1, 2), [7], recording)
    gc.collect()
    gc.disable()  # Only references count from here on: cycles would keep arrays.
    try:
        caches = Caches(model)
        mx.eval(model(mx.array([[1, 2, 3]]), cache=caches.made), caches.states)
        before = mx.get_active_memory()
        found = recorded(model, caches, tokens_of(1, 2), [7], recording)
        held = sum(part.nbytes for layer in found for part in layer.held)
        assert mx.get_active_memory() > before
        del found
        # The softmax caches of the test itself grew by less than a step of theirs.
        assert mx.get_active_memory() - before < held / 4
    finally:
        gc.enable()
