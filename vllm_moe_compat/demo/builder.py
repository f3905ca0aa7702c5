"""Build the demo checkpoint: train, quantise, check the generated text, write.

The golden text is computed: transformers runs the dequantised weights in float32 and in
bfloat16, and both must recite the Zen of Python. If they do not, training continues for a
bounded number of steps, and then the build fails. The prediction head is trained afterwards, on
the finished model, until most of its drafts are what the model says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moe_compat.demo import hub_form
from vllm_moe_compat.demo.prediction_head import HORIZON, HeadTrainer, accepted, new_head
from vllm_moe_compat.demo.reference import reference_head, reference_model
from vllm_moe_compat.demo.text import chat_prompt, make_tokenizer, zen
from vllm_moe_compat.demo.training import Progress, Trainer, recite, reproducible, text_config
from vllm_moe_compat.errors import SettingError

FORMAT = 2
"""Version of the checkpoint; a folder with another version is rebuilt."""

PROMPT = "Beautiful is better than"
CHAT_MESSAGE = "What is the Zen of Python?"
MAX_TOKENS = 64
EXTRA_ROUNDS, EXTRA_STEPS = 4, 40
HEAD_SEQUENCES, HEAD_LENGTH = 16, 160
HEAD_DRAFTS = 4
HEAD_ACCEPTED = 0.9
"""The least share of positions at which the head's first two drafts have to be right."""


@dataclass(frozen=True, slots=True)
class DemoCheckpoint:
    """A demo checkpoint on disk with its golden answers.

    ``text`` is the greedy continuation of ``prompt``, ``chat_text`` the greedy answer to
    ``chat_message`` through the chat template; both have at most ``max_tokens`` tokens.
    """

    path: Path
    prompt: str
    text: str
    max_tokens: int
    chat_message: str
    chat_text: str


def default_path() -> Path:
    """Return the folder in which an installed package keeps the demo checkpoint."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm_moe_compat" / "demo"


def build(
    path: str | Path, *, steps: int = 160, seed: int = 0, progress: Progress | None = None
) -> DemoCheckpoint:
    """Build the demo checkpoint in the folder, unless it is there with the same parameters.

    The folder appears complete or not at all: it is built beside and renamed into place.

    Raises:
        SettingError: the folder exists and is no demo checkpoint, or torch or
            transformers is not installed.
        RuntimeError: the trained model does not recite the text.
    """
    folder = Path(path).absolute()
    stamp = {"format": FORMAT, "steps": steps, "seed": seed}
    found = _found(folder, stamp)
    if found is not None:
        return found
    if folder.exists() and not (folder / "demo.json").is_file() and any(folder.iterdir()):
        raise SettingError(
            f"{folder} exists and is not a demo checkpoint, so it is not overwritten; "
            "name another folder, or remove that one."
        )
    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        raise SettingError(
            f"building the demo checkpoint needs {' and '.join(missing)}, which is not installed; "
            "run: pip install 'vllm-moe-compat[demo]'"
        )

    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        with reproducible(seed), _quiet():
            head = _build(work, steps, seed, progress or (lambda line: None))
        hub_form.write_json(work / "demo.json", stamp | {"prediction_head": head})
        return _move_into_place(work, folder, stamp)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _found(folder: Path, stamp: dict[str, int]) -> DemoCheckpoint | None:
    try:
        built = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
        if any(built.get(key) != value for key, value in stamp.items()):
            return None
        golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
        return DemoCheckpoint(path=folder, **golden)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _build(work: Path, steps: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Write the checkpoint and its golden text; return what is known of the prediction head."""
    text = zen()
    tokenizer = make_tokenizer(text)
    trainer = Trainer(text, tokenizer, seed=seed)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    progress(f"training a model of {parameters / 1e6:.1f} M parameters on the Zen of Python")
    trainer.run(steps, horizon=steps, progress=progress)
    for extra in range(EXTRA_ROUNDS + 1):
        tensors = hub_form.language_tensors(trainer.model)
        golden, wrong = _golden(tensors, tokenizer, text)
        if wrong is None:
            break
        if extra == EXTRA_ROUNDS:
            raise RuntimeError(
                f"after {steps + EXTRA_ROUNDS * EXTRA_STEPS} training steps the demo model still "
                f"does not recite its text: {wrong}; try another seed or more steps."
            )
        progress(f"not right yet ({wrong}); training {EXTRA_STEPS} steps more")
        trainer.run(EXTRA_STEPS, horizon=steps, progress=progress)
    progress(f"recites after FP8: {golden['prompt']}{golden['text'].splitlines()[0]} ...")
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    sequences = trainer.sequences(HEAD_SEQUENCES, HEAD_LENGTH)
    head, shares = _prediction_head(
        tensors, generator, sequences, _verses(tokenizer, text), progress
    )
    hub_form.write(work, tensors | head | hub_form.vision_tensors(generator), tokenizer)
    hub_form.write_json(work / "golden.json", golden)
    return {"accepted": shares}


def _prediction_head(
    tensors: dict[str, Any],
    generator: Any,
    sequences: list[list[int]],
    verses: tuple[list[int], int],
    progress: Progress,
) -> tuple[dict[str, Any], list[float]]:
    """Return the head's tensors, and the shares of its drafts that the quantised model says."""
    import torch

    model = reference_model(tensors, text_config(), torch.float32)
    said_by = reference_model(tensors, text_config(), torch.bfloat16)
    noise = {
        name: hub_form.noise(generator, *value.shape)
        for name, value in new_head(model.config).state_dict().items()
    }
    trainer = HeadTrainer(model, noise, sequences)
    trainer.run(HORIZON, progress)
    for extra in range(EXTRA_ROUNDS + 1):
        head = hub_form.head_tensors(trainer.head)
        quantized = reference_head(head, text_config(), torch.bfloat16)
        shares = accepted(quantized, said_by, *verses, HEAD_DRAFTS)
        if shares[1] >= HEAD_ACCEPTED:
            break
        if extra == EXTRA_ROUNDS:
            raise RuntimeError(
                f"of the prediction head's first two drafts only {shares[1]:.0%} are accepted, "
                f"expected {HEAD_ACCEPTED:.0%}; try another seed."
            )
        progress(
            f"not right yet ({shares[1]:.0%} of two drafts); training {EXTRA_STEPS} steps more"
        )
        trainer.run(EXTRA_STEPS, progress)
    progress(f"accepted of the head's first {HEAD_DRAFTS} drafts after FP8: {shares}")
    return head, shares


def _verses(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """Return the tokens of the text from the golden prompt on, and the prompt's last position."""
    verses = text.split("\n\n", 1)[1].strip()
    prompt = len(tokenizer(PROMPT).input_ids)
    return tokenizer(verses).input_ids, prompt - 1


def _golden(
    tensors: dict[str, Any], tokenizer: Any, text: str
) -> tuple[dict[str, Any], str | None]:
    """Return the answers of the quantised model, and the first wrong one in words."""
    import torch

    verses = text.split("\n\n", 1)[1].strip()
    answers = {"prompt": PROMPT, "chat_message": CHAT_MESSAGE, "max_tokens": MAX_TOKENS}
    questions = {
        "text": (PROMPT, verses.removeprefix(PROMPT)),
        "chat_text": (chat_prompt(CHAT_MESSAGE), verses),
    }
    for dtype in (torch.bfloat16, torch.float32):
        model = reference_model(tensors, text_config(), dtype)
        for key, (prompt, expected) in questions.items():
            answer = recite(model, tokenizer, prompt, MAX_TOKENS)
            if len(answer) < 2 * MAX_TOKENS or not expected.startswith(answer):
                return answers, f"{key} in {dtype} is {answer!r}"
            answers[key] = answer
    return answers, None


def _move_into_place(work: Path, folder: Path, stamp: dict[str, int]) -> DemoCheckpoint:
    old = work.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    try:
        work.rename(folder)
    except OSError:
        # Another process may have built the same checkpoint in the meantime.
        if _found(folder, stamp) is None:
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
    built = _found(folder, stamp)
    if built is None:
        raise RuntimeError(f"{folder} was changed by another process while it was built.")
    return built


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' advice to install kernels that a CPU cannot run."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
