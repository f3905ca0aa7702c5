"""Models of every module with experts compute the same logits with a share of them in memory.

The models are the recorded families of ``probes``, in the form in which they are released.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx_lm.models.cache import make_prompt_cache

import vllm_moe_compat
from support.memory_experts import cache_experts
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE
from vllm_moe_compat.load.options import loading_with
from vllm_moe_compat.probes.recipes import TOKENS, Family, families
from vllm_moe_compat.probes.variants import write

ROWS = {path.rpartition(".")[2]: row for path, row in TRANSFORMS_BY_MODULE.items()}
# The container stands at another place or is of another class.
DAILY = ("qwen3_moe", "gemma4", "llama4", "nemotron_h", "longcat_flash", "gpt_oss")
# Of a row that has experts in other models.
DENSE = {"mistral3"}


def _cases() -> list[object]:
    found = [f for f in families().values() if ROWS[f.module].moe and f.name not in DENSE]
    missing = set(DAILY) - {family.name for family in found}
    assert not missing, missing
    return [
        pytest.param(
            family,
            id=family.name,
            marks=[
                pytest.mark.needs(f"mlx_lm/models/{family.module}.py", "class Model"),
                *([] if family.name in DAILY else [pytest.mark.full]),
            ],
        )
        for family in found
    ]


@pytest.mark.parametrize("family", _cases())
def test_logits_are_those_of_the_resident_model(family: Family, tmp_path: Path) -> None:
    vllm_moe_compat.apply()
    write(tmp_path, family, ROWS[family.module], "release")
    with loading_with(dtype="float32", record=False):
        model, _ = mlx_lm.utils.load_model(tmp_path)
    model.set_dtype(mx.float32)
    expected = _logits(model)
    sources = cache_experts(model, slots=2)
    found = _logits(model)
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sources
    assert all(source.asked for source in sources.values())


def _logits(model: nn.Module) -> list[mx.array]:
    """Logits of a prompt, of tokens after it, and of a batch that is sorted by expert."""
    cache = make_prompt_cache(model)
    found = [model(mx.array([TOKENS[:20]]), cache=cache)]
    found += [model(mx.array([[token]]), cache=cache) for token in TOKENS[20:24]]
    found.append(model(mx.array([TOKENS, TOKENS[::-1]])))
    mx.eval(found)
    return found
