"""Train the demo model's prediction head, so that its drafts are accepted.

The head has the form of Qwen3.5's ``mtp``: at position t it takes the embedding of token t + 1
and the model's hidden state at t after the final norm, each through a norm of its own, joined in
this order; ``fc`` halves their width; one softmax layer with experts, a norm and the model's own
``lm_head`` follow. It predicts token t + 2. A further draft repeats this: the head's output
stands for the hidden state, and the draft for the token.

The model is trained before and stays as it is. The head learns what the model with its FP8
weights says next, two drafts ahead, in a few seconds. A pass over a whole sequence makes the
drafts after every position: the keys of later drafts are attended to by their own position
alone, as if each position were the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_moe_compat.demo.training import Progress

DRAFTS = 2
"""Drafts ahead that training looks at."""

BATCH = 4
HORIZON = 60
"""The learning rate falls until this step."""

_RATE = 3e-3


def new_head(config: Any) -> Any:
    """Return a head without trained weights for a model with this config.

    Its parameters have the names of the checkpoint, less the prefix ``mtp.``.
    """
    from torch import nn
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen

    one_layer = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    config = Qwen3_5MoeTextConfig(**(config.to_dict() | one_layer))
    config._attn_implementation = "sdpa"
    hidden, eps = config.hidden_size, config.rms_norm_eps
    head = nn.Module()
    head.layers = nn.ModuleList([qwen.Qwen3_5MoeDecoderLayer(config, 0)])
    head.fc = nn.Linear(2 * hidden, hidden, bias=False)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        setattr(head, name, qwen.Qwen3_5MoeRMSNorm(hidden, eps=eps))
    return head


def draft_logits(head: Any, model: Any, ids: Any, hidden: Any, drafts: int) -> list[Any]:
    """Return the logits of each draft after each position.

    ``ids`` is ``[B, T]``, ``hidden`` the model's hidden states ``[B, T, H]`` after the final
    norm. Item k is ``[B, T - 1 - k, V]``: what follows at position t + 2 + k, from the tokens up
    to t + 1 + k, of which the last k are given as drafts.
    """
    import torch
    from transformers import DynamicCache

    rows, length = ids.shape[0], ids.shape[1] - 1
    eye = torch.eye(length, dtype=torch.bool)
    visible = torch.ones_like(eye).tril()
    cache, out = DynamicCache(), []
    hidden = hidden[:, :length]
    for k in range(drafts):
        # The last k + 1 tokens of a row are the first ones of the sequence; they are cut below.
        tokens = torch.roll(ids, -1 - k, dims=1)[:, :length]
        embedded = head.pre_fc_norm_embedding(model.model.embed_tokens(tokens))
        joined = head.fc(torch.cat([embedded, head.pre_fc_norm_hidden(hidden)], dim=-1))
        positions = (torch.arange(length) + k).view(1, 1, -1).expand(3, rows, -1)
        hidden = head.norm(
            head.layers[0](
                joined,
                position_embeddings=model.model.rotary_emb(joined, positions),
                attention_mask=visible[None, None],
                past_key_values=cache,
            )
        )
        out.append(model.lm_head(hidden)[:, : length - k])
        visible = torch.cat([visible, eye], dim=1)
    return out


def accepted(head: Any, model: Any, ids: Sequence[int], start: int, drafts: int) -> list[float]:
    """Return the share of positions at which the model says the first 1, 2, … drafts too.

    ``ids`` is a text that the model says, from token ``start`` on. Shares fall, as a draft is
    accepted only after those before it.
    """
    import torch

    with torch.no_grad():
        tokens = torch.tensor([list(ids)])
        hidden, said = _said(model, tokens)
        shares, right = [], None
        for k, logits in enumerate(draft_logits(head, model, tokens, hidden, drafts)):
            hit = (logits.argmax(-1) == said[:, 1 + k :])[0, start:]
            right = hit if right is None else right[: hit.shape[0]] & hit
            shares.append(round(float(right.float().mean()), 4))
    return shares


def _said(model: Any, ids: Any) -> tuple[Any, Any]:
    """Return the hidden states ``[B, T, H]`` and the model's choices ``[B, T]`` after each."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden, model.lm_head(hidden).argmax(-1)


class HeadTrainer:
    """Train a head beside its model; ``run`` continues where the last call stopped."""

    def __init__(self, model: Any, weights: dict[str, Any], sequences: Sequence[list[int]]) -> None:
        """Start from ``weights``; the sequences have one length, and at least ``BATCH`` of them."""
        import torch

        self._model = model.requires_grad_(False)
        self._ids = torch.tensor(list(sequences))
        self._hidden, self._said = _said(model, self._ids)
        self._step = 0
        self.head = new_head(model.config).float()
        self.head.load_state_dict(weights, strict=True)
        self._optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.01
        )

    def run(self, steps: int, progress: Progress | None = None) -> None:
        """Train ``steps`` more steps, on all sequences in turn."""
        import torch
        from torch.nn.functional import cross_entropy

        for _ in range(steps):
            rate = min(1.0, (self._step + 1) / 10) * max(0.1, 1 - self._step / HORIZON)
            for group in self._optimizer.param_groups:
                group["lr"] = _RATE * rate
            rows = (torch.arange(BATCH) + self._step * BATCH) % len(self._ids)
            said, loss = self._said[rows], torch.zeros(())
            ids, hidden = self._ids[rows], self._hidden[rows]
            for k, logits in enumerate(draft_logits(self.head, self._model, ids, hidden, DRAFTS)):
                loss = loss + cross_entropy(logits.flatten(0, 1), said[:, 1 + k :].flatten())
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            self._optimizer.step()
            self._step += 1
            if progress and self._step % 20 == 0:
                value = float(loss.detach())
                progress(f"training the prediction head: step {self._step}, loss {value:.3f}")
