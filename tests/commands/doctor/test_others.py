"""The doctor says which library wraps the classes that served."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import vllm_moe_compat
from support import shim
from vllm_moe_compat.commands.doctor import steps
from vllm_moe_compat.commands.doctor.chain import _Chain
from vllm_moe_compat.commands.doctor.child import Outcome


@pytest.fixture(autouse=True)
def _reverted() -> Iterator[None]:
    vllm_moe_compat.revert()
    yield
    vllm_moe_compat.revert()


def test_the_words_name_the_library_and_the_place():
    remove = shim.install()
    try:
        vllm_moe_compat.apply()
        found = steps.others()
        vllm_moe_compat.revert()
    finally:
        remove()
    under = "wrapped by support.shim, too, under this wrapper"
    assert found == {"qwen3_5": under, "qwen3_5_moe": under}
    seen = _Chain(None, 1.0)._seen(Outcome({"text": "a", "others": {"qwen3_5": under}}))
    assert seen == f"the same answer twice: 'a'; qwen3_5 is {under}"
    vllm_moe_compat.apply()
    assert steps.others() == {}
