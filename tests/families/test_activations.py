"""Activations of MLPs and experts: those of the config, or a refusal by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

import vllm_moe_compat
from parity.families import FAMILIES
from parity.reference import TOKENS, new_config, new_model
from support.agreement import check_agreement, planned_loads
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families.fixes.activations import SAME, _function, activation_fix

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

KEYS = ("hidden_activation", "hidden_act", "mlp_hidden_act")
REFUSED = {
    *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("granitemoehybrid", "jamba", "kimi_linear", "falcon_h1", "olmo_hybrid"),
    "apertus",
}
UNREAD = {
    "gpt_oss",
    "minimax_m3_vl",
    "dbrx",
    "lfm2",
    "lfm2_moe",
    "step3p7",
}  # transformers' classes have their own activation.


def key_of(name: str) -> str:
    settings = new_config(FAMILIES[name]).get_text_config().to_dict()
    return next(key for key in KEYS if settings.get(key) is not None)


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_MOE_COMPAT_DTYPE", "float32")
    with vllm_moe_compat.applied():
        yield


@pytest.mark.parametrize("name", [n for n in FAMILIES if " " not in n and n not in UNREAD])
def test_every_module_computes_another_activation_or_refuses_it(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    key = key_of(name)
    own = SAME[new_config(family).get_text_config().to_dict()[key]]
    other = "relu" if own != "relu" else "silu"
    changed = replace(family, kwargs=family.kwargs | {key: other})
    reference = new_model(changed, False, 1.0)
    reference.save_pretrained(tmp_path)
    if name in REFUSED:
        with pytest.raises(UnsupportedCheckpointError, match=f"activation is '{other}'") as refusal:
            mlx_lm.utils.load_model(tmp_path)
        check_agreement(tmp_path, [], str(refusal.value))
        return
    with planned_loads() as plans:
        model, _ = mlx_lm.utils.load_model(tmp_path)
    model.set_dtype(mx.float32)
    with torch.no_grad():
        want = reference(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    got = np.array(model(mx.array([TOKENS]))[0])
    assert abs(got - want).max() / abs(want).max() < 5e-5
    assert [words for fix, words in plans[0].fixes if fix.id == "activation"] == [
        f"activation {other} in place of {own if name != 'starcoder2' else 'gelu'}"
    ]
    check_agreement(tmp_path, plans, None)


@pytest.mark.parametrize("name", sorted(set(SAME) - {"xielu", "gelu_accurate"}))
def test_functions_are_those_of_transformers(name: str) -> None:
    x = np.linspace(-6, 6, 241, dtype=np.float32)
    want = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(np.array(_function(SAME[name])(mx.array(x))), want, atol=2e-6)


def test_the_modules_own_activation_needs_nothing() -> None:
    settings = {"model_type": "llama", "hidden_act": "swish"}
    assert activation_fix().needed(settings) is None
    assert activation_fix().needed({"model_type": "llama"}) is None


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="activation is 'snake'"):
        activation_fix().needed({"model_type": "llama", "hidden_act": "snake"})


def test_a_module_without_an_mlp_is_refused() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="no MLP"):
        activation_fix().apply(nn.Linear(2, 2), {"model_type": "llama", "hidden_act": "gelu"})
