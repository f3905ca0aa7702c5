"""``layer_types`` of pruned and merged models: no period, or layers of one kind only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from parity.families import FAMILIES
from parity.reference import new_config
from support.cells import one_in
from support.oracle import Oracle, distance, step_by_step
from vllm_moe_compat.backend.model.describe_layers import describe
from vllm_moe_compat.backend.model.dry_run import dry_run
from vllm_moe_compat.backend.pages.layers import AttentionLayer
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.errors import UnsupportedCheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

TOKENS = [(7 * i * i + 3 * i + 5) % 96 for i in range(40)]
FULL = "full_attention"
# Families whose kinds of layers are in a list that config.json may give freely.
FREE = (
    *("cohere2", "gemma2", "gemma3", "gemma3_text", "olmo3", "exaone4", "gpt_oss", "afmoe"),
    *("laguna", "mellum", "exaone_moe", "mimo_v2_flash", "step3p7", "muse_glimmer", "gemma4"),
    *("qwen2", "qwen3", "qwen2_moe", "dots1", "smollm3"),
    *("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "kimi_linear"),
    *("granitemoehybrid", "lfm2", "lfm2_moe", "minimax_m3_vl"),
)
UNIFORM = {
    "smollm3": "a list of its own decides about rotary embeddings",
    "gemma4": "transformers makes the last layer a full one",
}
REFUSED = {
    *(("kimi_linear", kind) for kind in (FULL, "linear_attention")),
    *((name, kind) for name in ("lfm2", "lfm2_moe") for kind in (FULL, "conv")),
    ("mellum", "sliding_attention"),
}


def other_kind(name: str) -> str:
    """Return the kind beside full attention that a family has."""
    config = new_config(FAMILIES[name]).get_text_config(decoder=True)
    return next(iter(sorted({*config.layer_types} - {FULL})), "sliding_attention")


def with_kinds(name: str, kinds: list[str]) -> dict[str, Any]:
    """Return the settings of a family that give its layers these kinds."""
    count = len(kinds)
    text = new_config(FAMILIES[name]).get_text_config(decoder=True)
    settings = {"layer_types": kinds, "num_hidden_layers": count}
    if hasattr(text, "sliding_window"):
        settings |= {"sliding_window": 6, "use_sliding_window": True}
    if getattr(text, "mlp_layer_types", None) is not None:
        dense = int(text.mlp_layer_types[0] == "dense")
        settings["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (count - dense)
    if hasattr(text, "no_rope_layers"):
        settings["no_rope_layers"] = [1, 0, 1, 1, 0][:count]
    if hasattr(text, "num_attention_heads_per_layer"):
        settings["num_attention_heads_per_layer"] = [4] * count
    return settings


def check(oracle: Oracle) -> Any:
    """Compare a prompt and single tokens; return the loaded model."""
    wanted, model = oracle.logits(TOKENS), oracle.load()
    assert distance(np.array(model(mx.array([TOKENS])))[0], wanted) < 1e-4
    assert distance(step_by_step(model, TOKENS, prompt=17), wanted) < 1e-4
    return model


@pytest.mark.parametrize("pattern", ["FOOF", "OFOOF"])
@pytest.mark.parametrize("name", one_in(2, FREE))
def test_kinds_without_a_period(name: str, pattern: str, tmp_path: Path) -> None:
    kinds = [FULL if letter == "F" else other_kind(name) for letter in pattern]
    model = check(Oracle(tmp_path, name, **with_kinds(name, kinds)))
    assert inspect(str(tmp_path)).exit_code == 0
    assert len(model.layers) == len(kinds)


@pytest.mark.parametrize("letter", "FO")
@pytest.mark.parametrize("name", one_in(2, [name for name in FREE if name not in UNIFORM]))
def test_layers_of_one_kind(name: str, letter: str, tmp_path: Path) -> None:
    kind = FULL if letter == "F" else other_kind(name)
    oracle = Oracle(tmp_path, name, **with_kinds(name, [kind] * 3))
    if (name, kind) not in REFUSED:
        check(oracle)
        assert inspect(str(tmp_path)).exit_code == 0
        return
    with pytest.raises(UnsupportedCheckpointError, match=f"layer_types has {kind} layers, where"):
        oracle.load()
    assert inspect(str(tmp_path)).exit_code == 1


@pytest.mark.parametrize("kinds", ["FCCF", "CCC", "FFFF"])
def test_llama_4_refuses_what_its_module_cannot_build(kinds: str, tmp_path: Path) -> None:
    names = [FULL if letter == "F" else "chunked_attention" for letter in kinds]
    oracle = Oracle(tmp_path, "llama4", layer_types=names, num_hidden_layers=len(names))
    with pytest.raises(UnsupportedCheckpointError, match=r"layer_types is .* every fourth layer"):
        oracle.load()
    assert inspect(str(tmp_path)).exit_code == 1


def test_llama_4_refuses_other_layers_without_rotary_embedding(tmp_path: Path) -> None:
    kinds = ["chunked_attention"] * 3 + [FULL]
    settings = {"layer_types": kinds, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}
    with pytest.raises(UnsupportedCheckpointError, match="no_rope_layers is"):
        Oracle(tmp_path, "llama4", **settings).load()


@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("cohere2", "FOOF"),
        ("cohere2", "FFF"),
        ("gemma3", "OOO"),
        ("olmo3", "FFF"),
        ("gpt_oss", "OOO"),
        ("exaone_moe", "FFF"),
        ("mimo_v2_flash", "OOO"),
        ("qwen3_5_moe", "OOFOF"),
        ("qwen3_next", "FFF"),
    ],
)
def test_the_backend_pages_these_layers(name: str, letters: str, tmp_path: Path) -> None:
    kinds = [FULL if letter == "F" else other_kind(name) for letter in letters]
    model = Oracle(tmp_path, name, **with_kinds(name, kinds)).load()
    layers = describe(model)
    found = [
        FULL
        if isinstance(layer, AttentionLayer) and layer.window is None
        else "sliding_attention"
        if isinstance(layer, AttentionLayer)
        else "linear_attention"
        for layer in layers
    ]
    assert found == kinds
    assert dry_run(model, layers).failure == ""


def test_a_saved_config_keeps_its_kinds(tmp_path: Path) -> None:
    """What mlx-lm saves after a load loads the same again."""
    import mlx_lm.utils

    import vllm_moe_compat

    for name in ("olmo3", "exaone4"):
        kinds = ["sliding_attention"] * 3
        oracle = Oracle(tmp_path / name, name, **with_kinds(name, kinds))
        with vllm_moe_compat.applied():
            _, config = mlx_lm.utils.load_model(oracle.folder)
        mlx_lm.utils.save_config(config, tmp_path / "config.json")
        assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == kinds
