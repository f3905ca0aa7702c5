"""The cuts that a rank's load goes by are those that cutting a loaded model makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import vllm_moe_compat
from support import models
from support.loading import new_model
from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.probes.recipes import families
from vllm_moe_compat.probes.variants import write
from vllm_moe_compat.ranks.group import RankOf
from vllm_moe_compat.ranks.shard import shard
from vllm_moe_compat.ranks.spec import cuts_of, new_like, take

# Each way of cutting once.
DAILY = ("qwen3_moe", "gpt_oss", "qwen3_5_moe", "kimi_k3", "olmoe", "phi3", "bailing_moe_v3")
NAMES = [pytest.param(name, marks=() if name in DAILY else pytest.mark.full) for name in families()]


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model of each family, as the plugin loads it; unread."""
    family, folder = families()[request.param], tmp_path_factory.mktemp("checkpoint")
    write(folder, family, TRANSFORMS_BY_MODULE[f"mlx_lm.models.{family.module}"], "release")

    def load() -> Any:
        with vllm_moe_compat.applied(), loading_with(dtype="float32"):
            return load_model(folder, lazy=True)[0]

    return load


def parameters(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("count", [2, 4])
def test_cuts_are_those_of_a_loaded_model(loaded: Callable[[], Any], count: int):
    check(loaded, count)


YOUTU = {
    "model_type": "youtu_llm",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "vocab_size": 128,
}


def test_cuts_where_all_ranks_have_the_only_head_of_keys():
    """The part of a rank is then as large as the whole, beside norms of one head."""
    check(lambda: models.build_mlx("gemma4_text, k = v")[0], 2)


def test_cuts_of_a_class_that_names_its_arguments_in_another_way():
    check(lambda: new_model(YOUTU), 2)


def check(loaded: Callable[[], Any], count: int) -> None:
    for rank in range(count):
        seat, model = RankOf(rank, count), loaded()
        # New handles, since a class may divide a bias in place.
        whole = {name: array.astype(array.dtype) for name, array in parameters(model).items()}
        make = new_like(model)
        try:
            shard(model, seat)
        except UnsupportedServingError:
            assert count == 4
            with pytest.raises(UnsupportedServingError):
                cuts_of(make, seat)
            return
        cuts = cuts_of(make, seat)
        for name, array in parameters(model).items():
            assert mx.array_equal(take(name, whole[name], cuts).reshape(array.shape), array), name
