"""The config classes that vLLM gets for quantised checkpoints."""

from __future__ import annotations

import pickle

import pytest
from vllm.model_executor.layers.quantization import get_quantization_config

from vllm_moe_compat.backend.vllm import model_stubs


@pytest.mark.parametrize("method", model_stubs.METHODS)
def test_a_config_survives_the_way_into_a_spawned_process(method: str) -> None:
    model_stubs.register()
    config = get_quantization_config(method).from_config({"quant_method": method})
    again = pickle.loads(pickle.dumps(config))
    assert type(again) is type(config)
    assert (again.get_name(), again.config) == (method, {"quant_method": method})
