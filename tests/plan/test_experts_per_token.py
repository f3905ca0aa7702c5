"""What the config is read to say is what the module's router chooses."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import utils
from mlx_lm.models import switch_layers

from vllm_moe_compat.checkpoint.config import decode_floats
from vllm_moe_compat.errors import UnsupportedCheckpointError
from vllm_moe_compat.families import modules
from vllm_moe_compat.families.arguments import arguments
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.plan.effective_config import effective_config
from vllm_moe_compat.plan.experts_per_token import KEYS, experts_per_token
from vllm_moe_compat.probes import recipes

RECORDED = {
    name: family
    for name, family in recipes.families().items()
    if any(".experts." in tensor or "moe" in tensor for tensor in family.release.tensors)
}


def chosen(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Experts per token in the calls of the module's experts, in a pass of three tokens."""
    found: set[int] = set()
    for cls in (switch_layers.SwitchGLU, switch_layers.SwitchMLP):
        original = cls.__call__

        def call(self, x, indices, *args, original=original, **kwargs):
            found.add(indices.shape[-1])
            return original(self, x, indices, *args, **kwargs)

        monkeypatch.setattr(cls, "__call__", call)
    cls, args = utils._get_classes(config)
    mx.eval(cls(args.from_dict(config))(mx.array([[1, 2, 3]])))
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_it_is_what_the_router_chooses(name, monkeypatch):
    config = effective_config(decode_floats(RECORDED[name].release.config)).config
    counts = chosen(config, monkeypatch)
    assert experts_per_token(config, modules.find(config).path) == max(counts)


def test_every_mapped_module_with_experts_is_tried():
    tried = {f"mlx_lm.models.{family.module}" for family in RECORDED.values()}
    others = {m for m, row in TRANSFORMS_BY_MODULE.items() if row.moe is not None} - tried
    # gemma4's own text model, and a family that is recorded without experts.
    assert others == {"mlx_lm.models.gemma4_text", "mlx_lm.models.muse_spark"}
    assert all(not arguments(module).text.keys().isdisjoint(KEYS) for module in others)


def test_of_a_number_for_each_layer_the_largest_counts():
    config = {"model_type": "hunyuan", "moe_topk": [1, 4, 2]}
    assert experts_per_token(config, "mlx_lm.models.hunyuan") == 4


@pytest.mark.parametrize("value", ["eight", 0, -1, True, 2.5, [], [2, None]])
def test_an_odd_number_is_refused_by_name(value):
    config = {"model_type": "olmoe", "num_experts_per_tok": value}
    with pytest.raises(UnsupportedCheckpointError, match="num_experts_per_tok is"):
        experts_per_token(config, "mlx_lm.models.olmoe")


def test_without_a_number_the_names_are_listed():
    with pytest.raises(UnsupportedCheckpointError, match=r"as mlx_lm\.models\.olmoe names it"):
        experts_per_token({"model_type": "olmoe"}, "mlx_lm.models.olmoe")


def test_the_name_that_the_module_reads_counts():
    config = {"text_config": {"model_type": "gemma4_text", "top_k_experts": 2}, "moe_topk": 7}
    assert experts_per_token(config, "mlx_lm.models.gemma4") == 2
