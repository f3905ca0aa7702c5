"""A model that is right up to some length is served up to that length."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from support import models
from support.engine import engine_core, in_process_llm
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.families import registry
from vllm_moe_compat.families.fixes.fix import LengthLimit

pytestmark = pytest.mark.serve
LONGEST = 200
BEYOND = "the test's setting is ignored"


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose row has a limit of ``LONGEST`` tokens for its vocabulary."""
    module = "mlx_lm.models.qwen3"
    limit = LengthLimit(
        "test", BEYOND, ("vocab_size",), lambda s: LONGEST if s["vocab_size"] == 512 else None
    )
    none = LengthLimit("none", "nothing", (), lambda _: None)
    row = dataclasses.replace(registry.TRANSFORMS_BY_MODULE[module], limits=(none, limit))
    monkeypatch.setitem(registry.TRANSFORMS_BY_MODULE, module, row)
    return models.write(tmp_path / "limited", "qwen3", tokenizer_from=tmp_path)


def test_the_default_length_is_lowered_everywhere(
    limited: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("vllm_moe_compat")
    logger.addHandler(caplog.handler)  # vLLM's logger, its parent here, does not propagate
    try:
        with in_process_llm(limited, max_model_len=None, skip_tokenizer_init=True) as llm:
            assert engine_core(llm).scheduler.max_model_len == LONGEST
            assert llm.llm_engine.model_config.max_model_len == LONGEST
            prompt = {"prompt_token_ids": list(range(5, 5 + LONGEST + 1))}
            with pytest.raises(Exception, match=f"is {LONGEST} tokens"):
                llm.generate([prompt], use_tqdm=False)
    finally:
        logger.removeHandler(caplog.handler)
    said = [message for message in caplog.messages if BEYOND in message]
    assert any(f"right up to {LONGEST} tokens, since beyond that" in message for message in said)
    assert any("lowered from 4096 to 200" in message for message in said)


def test_a_longer_explicit_length_is_refused_and_a_shorter_one_kept(limited: Path) -> None:
    with (
        pytest.raises(ValueError, match=f"--max-model-len 201: .* up to {LONGEST} .*{BEYOND}"),
        in_process_llm(limited, max_model_len=LONGEST + 1, skip_tokenizer_init=True),
    ):
        pass
    with in_process_llm(limited, max_model_len=LONGEST, skip_tokenizer_init=True) as llm:
        assert llm.llm_engine.model_config.max_model_len == LONGEST


def test_inspect_says_it_before(limited: Path) -> None:
    found = {finding.id: finding for finding in inspect(str(limited)).findings}
    assert BEYOND in found["length-limited"].message
    assert found["length-limited"].severity == "warning"
