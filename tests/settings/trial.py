"""One trial: a config, transformers' logits, and those of the folder loaded by mlx-lm."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers

from parity.family import Family
from parity.reference import GRAIN, _values, new_config
from parity.release import release_names
from settings.baselines import Config, Path
from settings.values import ABSENT, LONG, SHORT
from support.agreement import planned_loads
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.plan import check_settings

AGREES = 1e-4
ROUNDS = 1e-3
"""A distance below it is rounding where transformers' logits moved a hundred times as far."""
MOVES = 1e-6
Logits = list[np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """What a trial showed.

    ``word``: ``moves with``, ``inert``, ``refused``, ``invalid``, ``silent``, ``limited`` (the load
    limits itself to shorter prompts), ``fails`` (an error that names no setting) or ``weak`` (it
    moves too little to tell). ``moved`` is how far transformers' logits are from the baseline's,
    ``distance`` how far ours are from theirs.
    """

    word: str
    moved: float | None = None
    distance: float | None = None
    why: str = ""


class Bench:
    """A family's tiny config, changed and tried."""

    def __init__(self, family: Family):
        self.family = family
        config = new_config(family)
        self.config_class = type(config)
        self.model_class = getattr(transformers, family.classes[1])
        self._random: dict[tuple[str, torch.Size], torch.Tensor] = {}
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            self.file: Config = self.config_class.get_config_dict(folder)[0]

    def section(self, file: Config) -> Config:
        """Return the language model's section of a config file."""
        text = file.get("text_config", file)
        assert isinstance(text, dict)
        return text

    def changed(self, changes: Iterable[tuple[Path, Any]], file: Config | None = None) -> Config:
        """Return the config file with settings changed; ``tie_word_embeddings`` at the top."""
        made = copy.deepcopy(self.file if file is None else file)
        for path, value in changes:
            section = made if path == ("tie_word_embeddings",) else self.section(made)
            for part in path[:-1]:
                section = section.setdefault(part, {})
            if value == ABSENT and isinstance(value, str):
                section.pop(path[-1], None)
            else:
                section[path[-1]] = copy.deepcopy(value)
        return made

    def resolve(self, file: Config) -> Config:
        """Return the settings that transformers makes of a config file."""
        whole = self.config_class.from_dict(copy.deepcopy(file))
        text: Config = whole.get_text_config(decoder=True).to_dict()
        if hasattr(whole, "tie_word_embeddings"):
            text["tie_word_embeddings"] = whole.tie_word_embeddings
        return text

    def model(self, file: Config) -> Any:
        """Return the transformers model; equal tensors have equal values in all trials."""
        config = self.config_class.from_dict(copy.deepcopy(file))
        torch.manual_seed(0)
        model = self.model_class._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if tensor.is_floating_point() and tensor.numel():
                    tensor.copy_(self._tensor(key, tensor))
        return model

    def _tensor(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        known = self._random.get((key, tensor.shape))
        if known is None:
            seed = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            known = self._random[key, tensor.shape] = _values(key, tensor, GRAIN, seed, False)
        return known

    def reference(self, file: Config) -> tuple[Any, Logits]:
        """Return the transformers model and its logits; raises if the config makes none."""
        settings = self.resolve(file)
        if settings.get("sliding_window") == 0 and "sliding_attention" in (
            settings.get("layer_types") or ()
        ):
            raise ValueError("a window of 0 tokens")
        model = self.model(file)
        logits = []
        for tokens in prompts(file, self.section(file)):
            with torch.no_grad():
                found = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
            if not np.isfinite(found).all():
                raise ValueError("the logits are not finite")
            logits.append(found)
        return model, logits

    def ours(self, model: Any, file: Config) -> Logits:
        """Save the model with the config file, load the folder by mlx-lm, return the logits.

        Prompts beyond the length that the load limits itself to are left out.
        """
        with tempfile.TemporaryDirectory() as folder, planned_loads() as plans:
            self.save(model, file, FilePath(folder))
            loaded, _ = mlx_lm.utils.load_model(FilePath(folder))
        loaded.set_dtype(mx.float32)
        longest = plans[-1].max_length or LONG  # A load says up to which length it is right.
        tokens = [prompt for prompt in prompts(file, self.section(file)) if len(prompt) <= longest]
        return [np.array(loaded(mx.array([prompt]))[0]) for prompt in tokens]

    def save(self, model: Any, file: Config, folder: FilePath) -> None:
        """Write the checkpoint, with the config file as it is."""
        model.save_pretrained(folder)
        if self.family.name == "kimi_vl":
            file = self._as_kimi_vl(folder, file)
        (folder / "config.json").write_text(json.dumps(file))

    def _as_kimi_vl(self, folder: FilePath, file: Config) -> Config:
        """Rename the tensors of a DeepSeek-V3 as Kimi-VL publishes them."""
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        save_file(release_names("kimi_vl", load_file(path)), path, {"format": "pt"})
        return {"model_type": "kimi_vl", "text_config": file | {"model_type": "deepseek_v3"}}

    def run(self, file: Config, base: Logits | None) -> tuple[Outcome, Logits | None]:
        """Try a config file against the baseline's logits.

        Returns:
            The outcome, and transformers' logits; None for an invalid config.
        """
        try:
            model, wanted = self.reference(file)
        except Exception as error:  # noqa: BLE001 - whatever an invalid config breaks
            return Outcome("invalid", why=_words(error)), None
        moved = math.inf if base is None else distance(wanted, base)
        moved = min(moved, 1e9)
        try:
            found = self.ours(model, file)
        except CompatError as error:
            return Outcome("refused", moved, why=_words(error)), wanted
        except Exception as error:  # noqa: BLE001 - mlx-lm fails with whatever broke
            return Outcome("fails", moved, why=_words(error)), wanted
        if not found:
            return Outcome("limited", moved), wanted
        apart = min(distance(found, wanted[: len(found)]), 1e9)
        if not (apart < AGREES or (apart < ROUNDS and apart < moved / 100)):
            return Outcome("silent", moved, apart), wanted
        if moved <= MOVES:
            return Outcome("inert", moved, apart), wanted
        return Outcome("moves with" if moved > 5 * apart else "weak", moved, apart), wanted


@contextlib.contextmanager
def without_record() -> Iterator[None]:
    """Load without the record, which is what the trials are for."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_settings, "classes_of", lambda module, kind: {})
        yield


def prompts(file: Config, section: Config) -> list[list[int]]:
    """Return a short and a long prompt within the vocabulary.

    The short one is first: transformers' dynamic rotary embeddings do not shrink again.
    """
    size = section.get("vocab_size") or file.get("vocab_size") or 48
    return [[(7 * i * i + 3 * i + 5) % min(size, 96) for i in range(n)] for n in (SHORT, LONG)]


def distance(found: Logits, wanted: Logits) -> float:
    """Return max|d| / max|wanted| over all prompts; infinite for other shapes."""
    worst = 0.0
    for left, right in zip(found, wanted, strict=True):
        if left.shape != right.shape or not np.isfinite(left).all():
            return math.inf
        worst = max(worst, float(np.abs(left - right).max() / np.abs(right).max()))
    return worst


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
