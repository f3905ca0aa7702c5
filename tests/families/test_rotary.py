"""Rotary embeddings: transformers' definition in every module, at every length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers
from mlx_lm.models import llama, rope_utils
from mlx_lm.models.cache import make_prompt_cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import vllm_moe_compat
from parity.families import FAMILIES
from parity.family import ROPE, THETA, VOCAB, Family
from parity.reference import new_config, new_model
from support.agreement import check_agreement, planned_loads
from vllm_moe_compat.errors import UnsupportedCheckpointError, UnsupportedServingError
from vllm_moe_compat.families.fixes import rotary
from vllm_moe_compat.families.fixes.rotary_embedding import RotaryEmbedding, computes
from vllm_moe_compat.families.fixes.rotary_frequencies import Rotary
from vllm_moe_compat.families.fixes.rotary_frequencies import rotary as defined
from vllm_moe_compat.plan.planned_load import PlannedLoad

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

ORIGINAL, LONGEST = 16, 64
LENGTHS = (12, 37, 90)  # Within the original length, within the longest, and beyond both.
Rope = dict[str, Any]


def ropes(pairs: int) -> dict[str, Rope]:
    """Return one rotary setting per definition, and YaRN with each of its further numbers."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    wide = yarn | {"factor": 32.0, "original_max_position_embeddings": 1024}
    return {
        "linear": {"rope_type": "linear", "factor": 2.0},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "proportional": {"rope_type": "proportional", "factor": 2.0},
        "yarn": yarn,
        "yarn truncate": wide | {"truncate": False},
        "yarn attention_factor": yarn | {"attention_factor": 1.3},
        "yarn mscale": yarn | {"mscale": 0.7},
        "yarn mscale_all_dim": yarn
        | {"mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 16.0, "beta_slow": 2.0},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        },
        "longrope": {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
            "long_factor": [2.0 + 0.1 * i for i in range(pairs)],
            "original_max_position_embeddings": ORIGINAL,
            "factor": 4.0,
        },
    }


def tokens(count: int) -> list[int]:
    return [(7 * i * i + 3 * i + 5) % VOCAB for i in range(count)]


@pytest.fixture
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def llama_config(rope: Rope, **more: Any) -> Any:
    settings = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    rope = rope | {"rope_theta": THETA}
    return transformers.LlamaConfig(
        **settings, max_position_embeddings=LONGEST, rope_parameters=rope, **more
    )


@pytest.mark.parametrize("name", list(ropes(8)))
def test_the_definitions_are_those_of_transformers(name: str) -> None:
    config = llama_config(ropes(8)[name])
    found = defined(config.rope_parameters, config.to_dict())
    define = ROPE_INIT_FUNCTIONS[found.kind]
    inverse, scale = define(config, torch.device("cpu"))
    np.testing.assert_allclose(found.inverse, inverse.numpy(), rtol=1e-6)
    assert found.scale == pytest.approx(scale, rel=1e-12)
    embedding = RotaryEmbedding(found, traditional=False)
    for length in LENGTHS:
        inverse, scale = define(config, torch.device("cpu"), seq_len=length)
        for offset in (length - 5, mx.array([0, length - 5])):
            freqs, own = embedding._at(5, offset)
            np.testing.assert_allclose(1 / np.array(freqs), inverse.numpy(), rtol=2e-6)
            assert own == pytest.approx(scale, rel=1e-12)


def scaled(family: Family, name: str) -> Family:
    """Return the family with these rotary settings in all kinds of its layers."""
    config = new_config(family).get_text_config()
    before = config.rope_parameters
    kept = ["rope_theta", "partial_rotary_factor", "mrope_section"]
    kept += ["llama_4_scaling_beta", "original_max_position_embeddings"]  # A pair of Mistral's.
    kinds = [kind for kind, value in before.items() if isinstance(value, dict)]

    def changed(rope: Rope) -> Rope:
        width = config.to_dict().get("qk_rope_head_dim")
        if not width:
            width = config.to_dict().get("head_dim") or config.hidden_size // 4
            width = int(width * rope.get("partial_rotary_factor", 1.0))
        return {k: v for k, v in rope.items() if k in kept} | ropes(width // 2)[name]

    new = {kind: changed(before[kind]) for kind in kinds} if kinds else changed(before)
    own: Rope = {"rope_parameters": new, "max_position_embeddings": LONGEST}
    if name == "yarn truncate":
        own["max_position_embeddings"] = 32768
    if name == "longrope" and family.name == "phi3":
        own["original_max_position_embeddings"] = ORIGINAL
    if "head_dim" in config.to_dict() and not config.to_dict()["head_dim"]:
        own["head_dim"] = 16  # transformers computes with None otherwise.
    return replace(family, kwargs=family.kwargs | own)


# transformers' own classes do not run these.
NESTED = (
    "mellum",
    "mimo_v2_flash",
    "step3p7",
    "laguna",
    "gemma3_text",
    "gemma3",
    "olmo3",
    "gemma4",
)
BROKEN = {
    *((name, "longrope") for name in NESTED),
    *(("gemma4", name) for name in ropes(8) if name != "proportional"),
    *((name, "proportional") for name in ("mistral4", "stablelm")),
    *((name, kind) for name in ("phi3", "phimoe") for kind in ropes(8)),
} - {("phi3", "longrope")}
HAVE_ROPES = [
    family
    for family in FAMILIES.values()
    if " " not in family.name and family.name not in ("jamba", "nemotron_h", "kimi_linear", "dbrx")
]
CASES = [(f, name) for f in HAVE_ROPES for name in ropes(8) if (f.name, name) not in BROKEN]


def daily(family: Family, name: str) -> bool:
    """Whether the case is the family's one of every day: where modules differ most."""
    if family.name in NESTED:
        return name == ("proportional" if family.name == "gemma4" else "yarn attention_factor")
    return name == "longrope"


@pytest.mark.usefixtures("_in_float32")
@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(f, n, marks=() if daily(f, n) else pytest.mark.full) for f, n in CASES],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_module_computes_every_type(
    family: Family, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = new_model(scaled(family, name), False, 1.0)
    reference.save_pretrained(tmp_path)
    with planned_loads() as plans, caplog.at_level("INFO", "vllm_moe_compat"):
        model, _ = mlx_lm.utils.load_model(tmp_path)
    model.set_dtype(mx.float32)
    for length in LENGTHS:
        with torch.no_grad():
            want = reference(torch.tensor([tokens(length)]), use_cache=False).logits[0].numpy()
        got = np.array(model(mx.array([tokens(length)]))[0])
        assert abs(got - want).max() / abs(want).max() < 5e-5, length
    # What is said to be put in is put in, and nothing else.
    put_in = [place for place in rotary.places(model) if type(place.rope) is RotaryEmbedding]
    said = [words for fix, words in plans[0].fixes if fix.id == "rotary"]
    assert bool(said) == bool(put_in)
    check_agreement(tmp_path, plans, None)


def saved(tmp_path: Path, config: Any) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    reference = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in reference.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    reference.save_pretrained(tmp_path)
    return reference


def small(name: str) -> Any:
    sizes = {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": VOCAB}
    return llama_config(ropes(8)[name], num_key_value_heads=2, **sizes)


@pytest.mark.usefixtures("_in_float32")
@pytest.mark.parametrize("prompt", [10, 30])
@pytest.mark.parametrize("name", ["longrope", "dynamic", "yarn truncate", "yarn attention_factor"])
def test_decoding_across_the_original_length(name: str, prompt: int, tmp_path: Path) -> None:
    """The frequencies change between passes, cached keys stay: in transformers as here."""
    reference = saved(tmp_path, small(name))
    model, _ = mlx_lm.utils.load_model(tmp_path)
    ids, cache, past = tokens(80), make_prompt_cache(model), None
    for part in (ids[:prompt], *([token] for token in ids[prompt:])):
        with torch.no_grad():
            step = reference(torch.tensor([part]), past_key_values=past, use_cache=True)
        past, want = step.past_key_values, step.logits[0].numpy()
        got = np.array(model(mx.array([part]), cache=cache)[0])
        assert abs(got - want).max() / abs(want).max() < 1e-4, cache[0].offset


@pytest.mark.usefixtures("_in_float32")
@pytest.mark.parametrize("name", ["linear", "yarn", "yarn mscale_all_dim", "llama3"])
def test_an_exact_module_is_left_alone(name: str, tmp_path: Path) -> None:
    saved(tmp_path, small(name))
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}  # mlx-lm's words.
    (tmp_path / "config.json").write_text(json.dumps(config))
    with planned_loads() as plans:
        model, _ = mlx_lm.utils.load_model(tmp_path)
    assert plans[0].fixes == ()
    vllm_moe_compat.revert()
    stock, _ = mlx_lm.utils.load_model(tmp_path)
    assert [type(p.rope) for p in rotary.places(model)] == [
        type(p.rope) for p in rotary.places(stock)
    ]
    ids = mx.array([tokens(37)])
    assert mx.array_equal(model(ids), stock(ids))


def embedding(name: str, traditional: bool = False, **rope: Any) -> RotaryEmbedding:
    config = llama_config(ropes(8)[name] | rope)
    found = defined(config.rope_parameters, config.to_dict())
    return RotaryEmbedding(found, traditional)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("name", ["yarn attention_factor", "longrope", "dynamic"])
def test_rows_at_different_offsets(name: str, traditional: bool) -> None:
    rope, x = embedding(name, traditional), mx.random.normal((3, 2, 4, 24))
    offsets = [50, 60, 70]  # One choice holds for a pass: all rows are beyond the length.
    together = rope(x, offset=mx.array(offsets))
    if name == "dynamic":
        rope.rotary = replace(rope.rotary, length=74, factor=rope.rotary.factor * 74 / LONGEST)
        rope = embedding(name, traditional)
        want = [_at_length(rope, x[i : i + 1], offsets[i], 74) for i in range(3)]
    else:
        want = [rope(x[i : i + 1], offset=offsets[i]) for i in range(3)]
    assert mx.allclose(together, mx.concatenate(want), atol=1e-5)
    assert mx.array_equal(together[..., 16:], x[..., 16:])


def _at_length(rope: RotaryEmbedding, x: mx.array, offset: int, length: int) -> mx.array:
    """Turn ``x`` with the frequencies of a longer sequence, which a neighbour in the batch has."""
    return mx.fast.rope(
        x,
        rope.dims,
        traditional=rope.traditional,
        base=None,
        scale=1.0,
        offset=offset,
        freqs=rope._grown(length, LONGEST),
    )


@pytest.mark.parametrize(
    ("rope", "follows"),
    [
        (nn.RoPE(16, base=THETA), True),
        (nn.RoPE(16, base=THETA, traditional=True), False),
        (nn.RoPE(16, base=THETA * 1.001), False),
        (nn.RoPE(16, base=THETA, scale=0.5), False),
        (nn.RoPE(8, base=THETA), False),
        (nn.RoPE(24, base=THETA), False),
        (rope_utils.YarnRoPE(16, base=THETA, scaling_factor=4.0), False),
        (rope_utils.YarnRoPE(16, base=THETA, scaling_factor=1.0), True),
        (rope_utils.SuScaledRoPE(16, base=THETA, max_position_embeddings=4096), True),
        (rope_utils.SuScaledRoPE(16, base=THETA, long_mscale=1.1), False),
    ],
)
def test_an_embedding_is_known_by_what_it_computes(rope: Any, follows: bool) -> None:
    plain = Rotary("default", 16, tuple(THETA ** (-i / 16) for i in range(0, 16, 2)))
    assert computes(rope, plain, traditional=False) is follows


def llama_model() -> Any:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB,
        "rope_theta": THETA,
    }
    return llama.Model(llama.ModelArgs.from_dict(config))


SETTINGS = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
}


def test_a_module_that_computes_something_else_is_refused() -> None:
    model = llama_model()
    rotary.check(model, SETTINGS | {"rope_parameters": ROPE})
    other = SETTINGS | {"rope_parameters": ROPE | {"rope_theta": 1e4}}
    with pytest.raises(UnsupportedCheckpointError, match=r"rope_theta.*layers\.[01]\.self_attn"):
        rotary.check(model, other)
    fix = rotary.rotary_fix()
    fix.apply(model, other)
    rotary.check(model, other)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn"},
        {"rope_type": "nonsense", "factor": 2.0},
        {"rope_type": ["yarn"]},
        {"rope_type": "linear", "factor": "x"},
        {"rope_type": "linear", "factor": 0},
        ropes(7)["longrope"],
    ],
)
def test_settings_without_a_meaning_are_refused(rope: Rope) -> None:
    fix = rotary.rotary_fix("linear", "yarn")
    with pytest.raises(UnsupportedCheckpointError, match=r"config\.json: rope_parameters"):
        fix.needed(SETTINGS | {"rope_parameters": rope | {"rope_theta": THETA}})


def test_a_module_without_an_embedding_is_refused() -> None:
    settings = SETTINGS | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(UnsupportedCheckpointError, match=r"linear \(factor 2.0\).* no rotary"):
        rotary.rotary_fix().apply(nn.Linear(2, 2), settings)


def with_rope(name: str) -> Any:
    model, settings = llama_model(), SETTINGS | {"rope_parameters": ROPE | ropes(8)[name]}
    rotary.rotary_fix().apply(model, settings)
    return model


@pytest.mark.parametrize(("longest", "which"), [(ORIGINAL, "short"), (ORIGINAL + 1, "long")])
def test_a_server_chooses_the_factors_once(longest: int, which: str) -> None:
    model = with_rope("longrope")
    words = rotary.settle(model, longest)
    assert words.startswith(f"the {which} factors of LongRoPE are in force")
    rope = model.layers[0].self_attn.rope
    for offset in (0, 50, mx.array([0, 50])):
        freqs, _ = rope._at(1, offset)
        assert freqs is (rope._short if which == "short" else rope._long)


def test_a_server_takes_the_dynamic_type_up_to_its_length() -> None:
    model = with_rope("dynamic")
    assert rotary.settle(model, LONGEST) == ""
    assert model.layers[0].self_attn.rope._at(1, 0)[0] is model.layers[0].self_attn.rope._short
    with pytest.raises(UnsupportedServingError, match=f"--max-model-len {LONGEST}"):
        rotary.settle(model, LONGEST + 1)


def test_without_positions_nothing_is_needed() -> None:
    settings = SETTINGS | {"rope_parameters": ROPE | ropes(8)["yarn"]}
    assert rotary.rotary_fix().needed(settings)
    assert rotary.rotary_fix().needed(settings | {"position_embedding_type": "nope"}) is None


def test_a_factor_that_yarn_implies_needs_nothing() -> None:
    yarn, fix = ropes(8)["yarn"] | {"rope_theta": THETA}, rotary.rotary_fix("yarn")
    # As files round it.
    assert (
        fix.needed(SETTINGS | {"rope_parameters": yarn | {"attention_factor": 1.1386294}}) is None
    )
    assert fix.needed(SETTINGS | {"rope_parameters": yarn | {"attention_factor": 1.1387}})


@pytest.mark.usefixtures("_in_float32")
def test_yarn_without_a_factor_takes_it_from_the_lengths(tmp_path: Path) -> None:
    """mlx-lm does not build it."""
    reference = saved(tmp_path, small("yarn"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["factor"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = mlx_lm.utils.load_model(tmp_path)
    with torch.no_grad():
        want = reference(torch.tensor([tokens(37)])).logits[0].numpy()
    got = np.array(model(mx.array([tokens(37)]))[0])
    assert abs(got - want).max() / abs(want).max() < 1e-5


@pytest.mark.usefixtures("_in_float32")
@pytest.mark.parametrize(("name", "longest"), [("dynamic", LONGEST), ("longrope", None)])
def test_only_the_dynamic_type_limits_the_length(
    name: str, longest: int | None, tmp_path: Path
) -> None:
    saved(tmp_path, small(name))
    with planned_loads() as plans:
        mlx_lm.utils.load_model(tmp_path)
    assert plans[0].max_length == longest


def put_in(plans: list[PlannedLoad]) -> list[str]:
    return [words for _, words in plans[0].fixes]


@pytest.mark.usefixtures("_in_float32")
def test_what_is_put_in_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, small("yarn truncate"))
    with planned_loads() as plans:
        mlx_lm.utils.load_model(tmp_path)
    (words,) = put_in(plans)
    assert words == (
        "rotary embedding yarn (factor 32.0, original_max_position_embeddings 1024, truncate False)"
    )


@pytest.mark.usefixtures("_in_float32")
@pytest.mark.parametrize("name", ["qwen2_moe", "llama"])
def test_a_converted_checkpoint_keeps_the_settings(name: str, tmp_path: Path) -> None:
    """The module is built unscaled, which its converted config must not say."""
    from vllm_moe_compat.commands.convert.to_mlx import _as_translated

    new_model(scaled(FAMILIES[name], "longrope"), False, 1.0).save_pretrained(tmp_path)
    _, config = mlx_lm.utils.load_model(tmp_path)
    assert config["rope_scaling"] is None
    original = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    written = _as_translated(tmp_path, config)["rope_scaling"]
    assert written.items() >= {k: v for k, v in original.items() if k != "rope_theta"}.items()
