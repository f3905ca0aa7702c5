"""Sliding windows in modules that ignore them, held against transformers past the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from parity.families import FAMILIES
from parity.reference import new_config
from support.oracle import Oracle, distance, step_by_step
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.model.dry_run import dry_run
from vllm_moe_compat.commands.inspect.collect import inspect

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

WINDOW = 6
TOKENS = [(7 * i * i + 3 * i + 5) % 96 for i in range(40)]
ON = {"sliding_window": WINDOW, "use_sliding_window": True}
S, F = "sliding_attention", "full_attention"


def _has_window(name: str) -> bool:
    return hasattr(new_config(FAMILIES[name]).get_text_config(decoder=True), "sliding_window")


WINDOWED = [name for name, family in FAMILIES.items() if name == family.base and _has_window(name)]
# Where mlx-lm's module has no window at all.
IGNORED: dict[str, tuple[dict[str, Any], list[int | None]]] = {
    "mistral": (ON, [WINDOW] * 2),
    "ministral3": (ON, [WINDOW] * 2),
    "mistral3": (ON, [WINDOW] * 2),
    "mixtral": (ON, [WINDOW] * 2),
    "phi3": (ON, [WINDOW] * 2),
    "phimoe": (ON, [WINDOW] * 2),
    "starcoder2": (ON, [WINDOW] * 2),
    "qwen3_moe": (ON, [WINDOW] * 2),
    "qwen2": (ON | {"max_window_layers": 1}, [None, WINDOW]),
    "qwen3": (ON | {"max_window_layers": 1}, [None, WINDOW]),
    "dots1": ({"sliding_window": WINDOW, "max_window_layers": 1}, [None, WINDOW]),
    "qwen2_moe": (ON | {"max_window_layers": 9}, [WINDOW, None]),
    "gemma2": (ON, [WINDOW, None]),
    "smollm3": (ON | {"no_rope_layers": [1, 0], "layer_types": [F, S]}, [None, WINDOW]),
}
SKIPPED = {"nemotron_h": "has the setting, and transformers' attention does not use it"}


def windows(model: Any) -> list[int | None]:
    """Return the window of each of the model's caches."""
    return [getattr(cache, "max_size", None) for cache in make_prompt_cache(model)]


def test_every_family_that_ignores_them_is_known() -> None:
    from vllm_moe_compat.families.fixes.windows import WindowFix
    from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE

    fixed = {
        row.module.rpartition(".")[2]
        for row in TRANSFORMS_BY_MODULE.values()
        if any(isinstance(fix, WindowFix) for fix in row.fixes)
    }
    assert {FAMILIES[name].module for name in IGNORED} <= fixed


@pytest.mark.parametrize("name", WINDOWED)
def test_a_prompt_and_single_tokens_past_the_window(name: str, tmp_path: Path) -> None:
    oracle = Oracle(tmp_path, name, **IGNORED.get(name, (ON, []))[0])
    wanted, model = oracle.logits(TOKENS), oracle.load()
    assert distance(np.array(model(mx.array([TOKENS])))[0], wanted) < 1e-5
    assert distance(step_by_step(model, TOKENS, prompt=17), wanted) < 1e-5
    if name not in SKIPPED:
        short = oracle.logits(TOKENS[-WINDOW - 1 :])
        assert distance(short[-1], wanted[-1]) > 1e-2, "the window has to show"


@pytest.mark.parametrize("name", IGNORED)
def test_caches_keep_the_window_only(name: str, tmp_path: Path) -> None:
    settings, wanted = IGNORED[name]
    model = Oracle(tmp_path, name, **settings).load()
    caches = make_prompt_cache(model)
    assert windows(model) == wanted
    model(mx.array([TOKENS]), cache=caches)
    for token in TOKENS[:3]:
        model(mx.array([[token]]), cache=caches)
    kept = [cache.keys.shape[2] for cache, window in zip(caches, wanted, strict=True) if window]
    assert max(kept) <= WINDOW


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "gemma2", "ministral3", "qwen2_moe"])
def test_a_ragged_batch_of_mlx_lm(name: str, tmp_path: Path) -> None:
    oracle = Oracle(tmp_path, name, **IGNORED[name][0])
    generator = BatchGenerator(oracle.load(), max_tokens=12, prefill_step_size=8)
    prompts = [TOKENS[:3], TOKENS[5:40], TOKENS[11:20], TOKENS[2:9]]
    done = dict(zip(generator.insert(prompts[:3]), map(list, prompts), strict=False))
    prompt_lengths = {uid: len(tokens) for uid, tokens in done.items()}
    found: dict[int, list[np.ndarray]] = {uid: [] for uid in done}
    steps = 0
    while responses := generator.next_generated():
        for response in responses:
            done[response.uid].append(response.token)
            found[response.uid].append(np.array(response.logprobs))
        steps += 1
        if steps == 4:  # A row joins rows whose windows are full.
            (late,) = generator.insert(prompts[3:])
            done[late], found[late], prompt_lengths[late] = list(prompts[3]), [], len(prompts[3])
    generator.close()
    for uid, tokens in done.items():
        assert len(found[uid]) == 12
        wanted = oracle.log_probabilities(tokens)[prompt_lengths[uid] - 1 : -1]
        assert distance(np.stack(found[uid]), wanted) < 1e-5


@pytest.mark.parametrize("name", ["mistral", "qwen3_moe", "gemma2"])
def test_caches_without_a_window_get_its_mask(name: str, tmp_path: Path) -> None:
    """A caller may bring caches of its own, as quantised ones."""
    settings, _ = IGNORED[name]
    oracle = Oracle(tmp_path, name, **settings)
    model, caches = oracle.load(), [KVCache(), KVCache()]
    found = [
        np.array(model(mx.array([part]), cache=caches)[0]) for part in (TOKENS[:21], TOKENS[21:])
    ]
    assert distance(np.concatenate(found), oracle.logits(TOKENS)) < 1e-5


def test_quantised_caches_see_the_window(tmp_path: Path) -> None:
    oracle = Oracle(tmp_path, "mistral", **ON, head_dim=64)
    caches = [QuantizedKVCache(group_size=32, bits=8) for _ in range(2)]
    found = np.array(oracle.load()(mx.array([TOKENS]), cache=caches)[0])
    assert distance(found, oracle.logits(TOKENS)) < 5e-2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": False}),
        ("qwen3", ON | {"max_window_layers": 2}),
        ("mistral", {"sliding_window": None}),
        ("mixtral", {"sliding_window": 512}),  # as many as there are positions
        ("gemma2", {"sliding_window": WINDOW, "layer_types": [F, F]}),
        ("llama", {}),
    ],
)
def test_without_a_window_the_module_is_left_alone(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    oracle = Oracle(tmp_path, name, **settings)
    model = oracle.load()
    assert type(model).__dict__.get("corrections") is None
    assert type(model.layers[0]).__dict__.get("corrections") is None
    assert windows(model) == [None, None]
    assert distance(np.array(model(mx.array([TOKENS])))[0], oracle.logits(TOKENS)) < 1e-5


def test_mistral_with_layer_types_is_ministral(tmp_path: Path) -> None:
    """As transformers' AutoConfig takes it; the module follows by itself if both kinds occur."""
    model = Oracle(tmp_path / "mixed", "mistral", **ON, layer_types=[S, F]).load()
    assert windows(model) == [WINDOW, None]
    model = Oracle(tmp_path / "all", "mistral", **ON, layer_types=[S, S]).load()
    assert windows(model) == [WINDOW, WINDOW]
    model = Oracle(tmp_path / "none", "mistral", **ON, layer_types=[F, F]).load()
    assert windows(model) == [None, None]


def test_other_instances_of_the_class_stay_as_they_are(tmp_path: Path) -> None:
    first = Oracle(tmp_path / "first", "qwen2", **ON, max_window_layers=0).load()
    other = Oracle(tmp_path / "other", "qwen2").load()
    assert windows(first) == [WINDOW, WINDOW]
    assert not hasattr(other, "make_cache")
    assert type(first).__name__ == type(other).__name__
    assert type(first).__module__ == type(other).__module__


def test_inspect_and_the_load_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, _ = IGNORED["qwen2"]
    oracle = Oracle(tmp_path, "qwen2", **settings)
    found = inspect(str(tmp_path))
    words = f"a window of {WINDOW} tokens in 1 of 2 layers"
    assert found.ours is not None
    assert ("put into the forward pass", words) in [(s.action, s.targets) for s in found.ours.steps]
    assert found.stock is not None
    assert any(words in reason for reason in found.stock.reasons)
    assert found.memory is not None
    kinds = {kind.kind: kind for kind in found.memory.cache}
    assert (kinds["window"].layers, kinds["window"].window) == (1, WINDOW)
    assert kinds["softmax"].layers == 1
    with caplog.at_level("INFO", "vllm_moe_compat"):
        oracle.load()
    assert f"put {words} into mlx_lm.models.qwen2" in caplog.text


@pytest.mark.parametrize("name", IGNORED)
def test_the_backend_pages_windows_of_whole_batches(name: str, tmp_path: Path) -> None:
    settings, wanted = IGNORED[name]
    model = Oracle(tmp_path, name, **settings).load()
    layers = describe(model)
    assert [layer.window for layer in layers] == wanted  # type: ignore[union-attr]
    assert dry_run(model, layers).failure == ""


def test_quantised_weights_keep_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(tmp_path, "mistral", **ON)
    monkeypatch.setenv("VLLM_MOE_COMPAT_QUANTIZE", "8bit")
    model = oracle.load()
    assert windows(model) == [WINDOW, WINDOW]
    found = step_by_step(model, TOKENS, prompt=9)
    assert distance(found, oracle.logits(TOKENS)) < 0.1
