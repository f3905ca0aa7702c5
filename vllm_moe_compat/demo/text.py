"""The text that the demo model recites, and the tokenizer trained on it.

The Zen of Python ships with every Python, so the demo needs no download. The tokenizer is a
byte-level BPE: any text round-trips. It has the special tokens of ChatML and a chat template.
"""

from __future__ import annotations

import ast
import codecs
import importlib.util
from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}{{- part.text }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def zen() -> str:
    """Return the Zen of Python.

    Importing ``this`` would print it, so the rot13 string in its source is read instead.

    Raises:
        RuntimeError: the source holds no such string.
    """
    spec = importlib.util.find_spec("this")
    if spec is not None and spec.origin is not None:
        for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                return codecs.decode(str(node.value.value), "rot13").strip() + "\n"
    raise RuntimeError("the standard library's module `this` holds no text to train the demo on")


def chat_prompt(message: str) -> str:
    """Return the prompt that the chat template renders for one user message."""
    return f"{TURN_START}user\n{message}{TURN_END}\n{TURN_START}assistant\n"


def make_tokenizer(text: str) -> Any:
    """Train the tokenizer: at most ``VOCAB_SIZE`` entries, special tokens last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, TURN_START, TURN_END, *VISION_TOKENS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
