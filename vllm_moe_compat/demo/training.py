"""Train the demo model, which recites the Zen of Python.

The architecture is transformers' own Qwen3.5-MoE at about 2.5 M parameters:
three gated-delta layers and one softmax layer, eight experts of which two are
used, a shared expert. The hidden size, 192, is a multiple of 64 and not of 128,
so that FP8 blocks are ragged at the edge. Heads are at least 32 wide, as MLX's gated-delta kernel
for Metal requires.

Training takes about half a minute on two cores. It is seeded and runs on a fixed
number of threads, which determines the order of sums. Another machine or torch release
may still give other weights, so the builder checks the generated text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_moe_compat.demo.text import END_OF_TEXT, TURN_END, VOCAB_SIZE, chat_prompt

Progress = Callable[[str], None]

THREADS = 2
BATCH = 8
WINDOW = 64
LONG_WINDOW = 320
"""Length of the two windows of every eighth batch: the model must also recite at length."""


def text_config() -> dict[str, Any]:
    """Return the ``text_config`` of ``config.json``."""
    return {
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "full_attention_interval": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 64,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 64,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000,
            "rope_type": "default",
        },
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 128,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def new_model() -> Any:
    """Return the untrained model, in float32."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    settings = text_config() | {"dtype": "float32"}
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**settings)).float()


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch and fix its threads for the ``with`` block, then restore both."""
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class Trainer:
    """Train one model; ``run`` continues where the last call stopped."""

    def __init__(self, text: str, tokenizer: Any, *, seed: int) -> None:
        import torch

        self._text = text
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._step = 0
        self.model = new_model()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01
        )
        # Three copies, so that a window may start anywhere; each ends with the end token.
        self._stream: list[int] = tokenizer(text + END_OF_TEXT).input_ids * 3
        self._period = len(self._stream) // 3

    def run(self, steps: int, *, horizon: int, progress: Progress | None = None) -> float:
        """Train ``steps`` more steps and return the last loss.

        The learning rate falls linearly until step ``horizon``.
        """
        import torch

        self.model.train()
        loss = float("nan")
        for _ in range(steps):
            rate = min(1.0, (self._step + 1) / 10) * max(0.1, 1 - self._step / horizon)
            for group in self._optimizer.param_groups:
                group["lr"] = 3e-3 * rate
            ids = torch.tensor(self._batch())
            result = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            self._optimizer.zero_grad(set_to_none=True)
            result.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._step += 1
            loss = float(result.detach())
            if progress and self._step % 20 == 0:
                progress(f"training: step {self._step}, loss {loss:.3f}")
        self.model.eval()
        return loss

    def sequences(self, count: int, length: int) -> list[list[int]]:
        """Return more text of the kind that the model was trained on, a quarter of it chat."""
        return [self._chat(length) if n % 4 == 0 else self._plain(length) for n in range(count)]

    def _batch(self) -> list[list[int]]:
        if self._step % 8 == 7:
            return [self._plain(LONG_WINDOW) for _ in range(2)]
        return [self._chat(WINDOW) if n < 2 else self._plain(WINDOW) for n in range(BATCH)]

    def _plain(self, length: int) -> list[int]:
        start = self._random.randrange(self._period)
        return self._stream[start : start + length]

    def _chat(self, length: int) -> list[int]:
        """Return a chat turn: random words of the text as the question, the text as the answer."""
        words = self._text.split()
        first = self._random.randrange(len(words))
        said = " ".join(words[first : first + self._random.randint(1, 8)])
        verses = self._text.split("\n\n", 1)[1]
        turn = chat_prompt(said) + verses.strip() + TURN_END
        ids: list[int] = self._tokenizer(turn).input_ids
        return ids[:length]


def recite(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return the greedy continuation of the prompt, at most ``tokens`` tokens."""
    import torch

    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END]),
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
