"""The demo checkpoint's prediction head is trained: its drafts are what the model says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vllm_moe_compat import demo
from vllm_moe_compat.demo import builder
from vllm_moe_compat.demo.prediction_head import accepted, draft_logits
from vllm_moe_compat.demo.text import zen


@pytest.fixture(scope="module")
def recorded(demo_checkpoint: demo.DemoCheckpoint) -> list[float]:
    head = json.loads((demo_checkpoint.path / "demo.json").read_text())["prediction_head"]
    return list(head["accepted"])


@pytest.fixture(scope="module")
def tokens(demo_checkpoint: demo.DemoCheckpoint) -> list[int]:
    """The verses, from the golden prompt on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint.path)
    return list(tokenizer(zen().split("\n\n", 1)[1].strip()).input_ids)


def test_the_stored_head_is_as_good_as_recorded(
    demo_checkpoint: demo.DemoCheckpoint, recorded: list[float], tokens: list[int]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint.path)
    prompt = len(tokenizer(demo_checkpoint.prompt).input_ids)
    model = demo.load_reference(demo_checkpoint.path, "bfloat16")
    head = demo.load_reference_head(demo_checkpoint.path, "bfloat16")
    assert accepted(head, model, tokens, prompt - 1, 4) == pytest.approx(recorded, abs=0.02)
    assert recorded == sorted(recorded, reverse=True)
    assert recorded[1] >= 0.9


def test_drafts_after_all_positions_are_those_after_each(
    demo_checkpoint: demo.DemoCheckpoint, tokens: list[int]
) -> None:
    """One pass per draft, as a server computes them, gives the same logits."""
    import torch
    from transformers import DynamicCache

    ids = torch.tensor([tokens[:24]])
    model = demo.load_reference(demo_checkpoint.path)
    head = demo.load_reference_head(demo_checkpoint.path)

    def step(taken: Any, states: Any, start: int, cache: Any) -> Any:
        embedded = head.pre_fc_norm_embedding(model.model.embed_tokens(taken))
        x = head.fc(torch.cat([embedded, head.pre_fc_norm_hidden(states)], -1))
        places = torch.arange(start, start + taken.shape[1]).view(1, 1, -1).expand(3, 1, -1)
        rotary = model.model.rotary_emb(x, places)
        visible = torch.ones(taken.shape[1], start + taken.shape[1], dtype=torch.bool).tril(start)
        return head.norm(
            head.layers[0](
                x,
                position_embeddings=rotary,
                attention_mask=visible[None, None],
                past_key_values=cache,
            )
        )

    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        at_once = draft_logits(head, model, ids, hidden, 3)
        for position in (0, 7, 19):
            cache = DynamicCache()
            state = step(ids[:, 1 : position + 2], hidden[:, : position + 1], 0, cache)[:, -1:]
            for k, wanted in enumerate(at_once):
                found = model.lm_head(state)[0, 0]
                torch.testing.assert_close(found, wanted[0, position], atol=1e-4, rtol=1e-4)
                if k < 2:
                    token = ids[:, position + 2 + k, None]
                    state = step(token, state, position + 1 + k, cache)


def test_a_head_whose_drafts_are_wrong_fails_the_build(
    demo_checkpoint: demo.DemoCheckpoint, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    monkeypatch.setattr(builder, "HORIZON", 1)
    monkeypatch.setattr(builder, "EXTRA_ROUNDS", 0)
    tensors: dict[str, Any] = {}
    for shard in demo_checkpoint.path.glob("*.safetensors"):
        tensors |= load_file(shard)
    generator = torch.Generator().manual_seed(0)
    sequences = [tokens[first : first + 24] for first in range(4)]
    with pytest.raises(RuntimeError, match=r"only \d+% are accepted, expected 90%"):
        builder._prediction_head(tensors, generator, sequences, (tokens, 5), lambda line: None)


def test_a_checkpoint_of_an_older_format_is_not_taken(
    demo_checkpoint: demo.DemoCheckpoint, tmp_path: Path
) -> None:
    old = tmp_path / "demo"
    shutil.copytree(demo_checkpoint.path, old)
    stamp = {"format": builder.FORMAT, "steps": 160, "seed": 0}
    assert builder._found(old, stamp) is not None
    for written in ({"format": 1, "steps": 160, "seed": 0}, stamp | {"steps": 80}):
        (old / "demo.json").write_text(json.dumps(written))
        assert builder._found(old, stamp) is None
