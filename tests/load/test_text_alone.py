"""Text models that transformers saves by themselves, for modules of larger models.

``transformers.*ForCausalLM(config).save_pretrained``: a model type of its own, a config without
sections, names without the outer model's prefix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import vllm_moe_compat
from parity.available import missing
from parity.families import EVERY, FAMILIES
from parity.family import WINDOW, Family, causal
from parity.reference import GRAIN, State, new_model
from parity.verdict import judge
from support.agreement import check_agreement, planned_loads
from support.loading import load
from support.saved import oracle, write
from vllm_moe_compat.errors import UnsupportedCheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

GEMMA_4 = EVERY["gemma4"].kwargs
GEMMA_4_DENSE = GEMMA_4 | {"enable_moe_block": False, "num_experts": None}
LLAMA_4 = EVERY["llama4"].kwargs
MINIMAX_M3 = EVERY["minimax_m3_vl"].kwargs
HUNYUAN = {"num_experts": 4, "moe_topk": 2, "head_dim": 16}
TEXT = {
    family.name: family
    for family in (
        Family("gemma4_text", "gemma4_text", ("Gemma4TextConfig", "Gemma4ForCausalLM"), GEMMA_4),
        Family(
            "gemma4_text untied",
            "gemma4_text",
            ("Gemma4TextConfig", "Gemma4ForCausalLM"),
            GEMMA_4 | {"tie_word_embeddings": False},
        ),
        Family(
            "gemma4_text shared keys",
            "gemma4_text",
            ("Gemma4TextConfig", "Gemma4ForCausalLM"),
            GEMMA_4_DENSE
            | {
                "hidden_size_per_layer_input": 16,
                "num_hidden_layers": 4,
                "layer_types": WINDOW * 2,
                "num_kv_shared_layers": 2,
            },
        ),
        Family(
            "gemma4_unified_text",
            "gemma4_text",
            ("Gemma4UnifiedTextConfig", "Gemma4UnifiedForCausalLM"),
            GEMMA_4_DENSE,
        ),
        Family("llama4_text", "llama4", ("Llama4TextConfig", "Llama4ForCausalLM"), LLAMA_4),
        Family(
            "llama4_text tied",
            "llama4",
            ("Llama4TextConfig", "Llama4ForCausalLM"),
            LLAMA_4 | {"tie_word_embeddings": True},
        ),
        Family(
            "minimax_m3_vl_text",
            "minimax_m3_vl",
            ("MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM"),
            MINIMAX_M3,
        ),
        causal("hunyuan_v1_moe untied", "hunyuan", "HunYuanMoEV1", **HUNYUAN),
        causal(
            "hunyuan_v1_dense tied",
            "hunyuan_v1_dense",
            "HunYuanDenseV1",
            head_dim=16,
            tie_word_embeddings=True,
        ),
        EVERY["hunyuan_v1_dense"],
        EVERY["kimi_linear"],
        EVERY["gemma3_text"],
        EVERY["ministral3"],
        EVERY["qwen3_5_text"],
        EVERY["qwen3_5_moe_text"],
    )
    if missing(family) is None
}


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


def save(family: Family, folder: Path, **options: Any) -> Path:
    new_model(family, False, GRAIN).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("name", TEXT)
def test_a_text_model_is_that_of_transformers(name: str, original: bool, tmp_path: Path):
    folder = save(TEXT[name], tmp_path, save_original_format=original)
    with planned_loads() as plans:
        found = judge(folder, oracle(folder, TEXT[name]), 1e-5)
    assert found.word == "right", found
    check_agreement(folder, plans, None)


def stacked(tensors: State, base: str) -> State:
    """Return Gemma 4's experts as most modules of mlx-lm have them."""
    found: State = {}
    for name, value in tensors.items():
        path, _, last = name.rpartition(".")
        if not path.endswith(".experts"):
            found[name] = value
            continue
        layer = path.removesuffix("experts")
        parts = value.chunk(2, dim=-2) if last == "gate_up_proj" else (value,)
        for part, array in zip(("gate", "up") if len(parts) > 1 else ("down",), parts, strict=True):
            found[f"{layer}{base}.{part}_proj.weight"] = array.contiguous()
    return found


@pytest.mark.parametrize("base", ["experts.switch_mlp", "mlp.switch_mlp", "experts.switch_glu"])
@pytest.mark.parametrize("name", ["gemma4_text", "gemma4"])
def test_gemma_4_with_stacked_experts(name: str, base: str, tmp_path: Path):
    family = TEXT.get(name) or FAMILIES[name]
    folder = save(family, tmp_path / "saved")
    wanted = oracle(folder, family)
    tensors: State = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((folder / "config.json").read_text())
    other = stacked(tensors, base)
    assert other.keys() != tensors.keys()
    folder = write(tmp_path / "stacked", other, config)
    with planned_loads() as plans:
        found = judge(folder, wanted, 1e-5)
    assert found.word == "right", found
    check_agreement(folder, plans, None)


def refused(folder: Path, words: str) -> None:
    with planned_loads() as plans, pytest.raises(UnsupportedCheckpointError, match=words) as caught:
        load(folder)
    check_agreement(folder, plans, str(caught.value))


def test_minimax_with_linear_attention_is_another_model(tmp_path: Path):
    family = causal(
        "minimax",
        "minimax",
        "MiniMax",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    )
    refused(save(family, tmp_path), "linear attention")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"no_rope_layers": [1, 0, 1, 0]}, "layer_types"),  # The class derives them.
        ({"moe_layers": [0, 1]}, "moe_layers"),
    ],
    ids=str,
)
def test_llama_4_with_irregular_layers_is_refused(
    changes: dict[str, Any], named: str, tmp_path: Path
):
    family = Family(
        "llama4_text irregular",
        "llama4",
        ("Llama4TextConfig", "Llama4ForCausalLM"),
        LLAMA_4 | changes,
    )
    refused(save(family, tmp_path), named)


def test_a_dense_llama4_text_is_left_to_the_module_of_that_name():
    from vllm_moe_compat.families import modules

    assert modules.row_of_config({"model_type": "llama4_text", "moe_layers": []}) is None
    row = modules.row_of_config({"model_type": "llama4_text", "moe_layers": [1, 3]})
    assert row is not None
    assert row.module == "mlx_lm.models.llama4"
