"""What a run of a model counts and reads is what slots kept naively say of the same routing."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.glm4_moe import Model, ModelArgs
from mlx_lm.models.switch_layers import SwitchGLU

from support.expert_slots import Slots
from support.memory_experts import cache_experts
from vllm_moe_compat.expert_cache import counters

EXPERTS, CHOSEN, LAYERS = 32, 4, 3


def random_model() -> Model:
    """The same one whenever it is called."""
    mx.random.seed(3)
    model = Model(
        ModelArgs(
            model_type="glm4_moe",
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            max_position_embeddings=512,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            num_attention_heads=2,
            n_group=1,
            head_dim=16,
            topk_group=1,
            n_shared_experts=1,
            n_routed_experts=EXPERTS,
            routed_scaling_factor=1.0,
            num_experts_per_tok=CHOSEN,
            first_k_dense_replace=0,
            num_hidden_layers=LAYERS,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            rope_scaling=None,
            use_qk_norm=False,
            tie_word_embeddings=False,
            attention_bias=False,
            partial_rotary_factor=0.5,
        )
    )
    for layer in model.layers:
        layer.mlp.gate.weight = mx.random.normal(layer.mlp.gate.weight.shape)
        rank = mx.random.permutation(mx.arange(1, EXPERTS + 1))
        layer.mlp.gate.e_score_correction_bias = -0.05 * mx.log(rank)
    mx.eval(model.parameters())
    return model


def run(model: Model) -> mx.array:
    """Two prompts of two rows and what follows them; the last logits of every pass."""
    found = []
    for seed, prompt in ((0, 50), (1, 9)):
        caches = make_prompt_cache(model)
        tokens = mx.random.randint(0, 64, (2, prompt + 16), key=mx.random.key(seed))
        for part in mx.split(tokens, range(prompt, prompt + 16), axis=1):
            found.append(model(part, cache=caches)[:, -1])
            mx.eval(found)
    return mx.stack(found)


def recorded(model: Model) -> list[list[list[int]]]:
    """Return the lists to which a resident model adds its router's choices, by layer."""
    found: list[list[list[int]]] = [[] for _ in model.layers]

    class Recorded(SwitchGLU):
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            found[places[id(self)]].append(np.array(indices).reshape(-1).tolist())
            return super().__call__(x, indices)

    places = {id(layer.mlp.switch_mlp): i for i, layer in enumerate(model.layers)}
    for layer in model.layers:
        layer.mlp.switch_mlp.__class__ = Recorded
    return found


@pytest.mark.parametrize("slots", [CHOSEN, 8, 16])
def test_counters_and_reads_are_those_of_slots_kept_naively(slots: int) -> None:
    resident = random_model()
    routing = recorded(resident)
    expected = run(resident)
    model = random_model()
    sources = cache_experts(model, slots)
    before = counters.layers()
    assert mx.array_equal(run(model), expected)
    counted = counters.layers()
    for (path, source), passes in zip(sorted(sources.items()), routing, strict=True):
        naive = Slots(slots)
        groups = [group for uses in passes for group in naive.run(Counter(uses))]
        assert source.asked == [read for _, read in groups if read]
        found = counted[path] - before.get(path, counters.Counters())
        assert (found.hits, found.misses) == (naive.hits, naive.misses)
        assert (found.passes, found.groups) == (len(passes), len(groups))
        assert found.bytes_read == naive.misses * source.nbytes
        assert found.failures == 0
        # Experts come back that had been overwritten.
        assert naive.misses > len({expert for uses in passes for expert in uses})
        assert naive.hits
