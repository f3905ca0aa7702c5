"""Config classes that another package registers in transformers do not decide."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers
from vllm.transformers_utils.configs.kimi_linear import KimiLinearConfig

from parity.families import FAMILIES
from parity.reference import new_config
from vllm_moe_compat.plan.effective_config import effective_config, has_class, resolve


@pytest.fixture
def _as_under_vllm() -> Iterator[None]:
    registered = transformers.CONFIG_MAPPING._extra_content
    before = dict(registered)
    transformers.AutoConfig.register("kimi_linear", KimiLinearConfig, exist_ok=True)
    registered["unheard_of"] = KimiLinearConfig
    yield
    registered.clear()
    registered.update(before)


@pytest.mark.usefixtures("_as_under_vllm")
def test_vllms_class_does_not_take_the_place_of_transformers():
    assert transformers.CONFIG_MAPPING["kimi_linear"] is KimiLinearConfig
    own = new_config(FAMILIES["kimi_linear"])
    config = own.to_dict()
    del config["layer_types"]  # Of which vLLM's class knows nothing.
    kinds = type(own).from_dict(config).layer_types
    assert resolve(config)["layer_types"] == kinds
    linear = [i for i, kind in enumerate(kinds, start=1) if kind == "linear_attention"]
    assert effective_config(config).config["linear_attn_config"]["kda_layers"] == linear


@pytest.mark.usefixtures("_as_under_vllm")
def test_a_type_that_vllm_alone_knows_has_no_class():
    assert not has_class({"model_type": "unheard_of"})
