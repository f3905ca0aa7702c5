"""Find adapters: small trained additions to a model's weights, in files or among tensors.

Neither mlx-lm's ``load_model`` nor this package applies an adapter. One that lies beside full
weights is mentioned; tensors of an unmerged one, or an adapter alone, are no model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from vllm_moe_compat.checkpoint.files import FileFault

FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
    "adapters.safetensors",
)
"""Files that PEFT and mlx-lm write."""
MERGE = (
    "merge the adapter into its base model, with merge_and_unload of peft or with "
    "`mlx_lm.fuse`, and load the result"
)
_MARKS = (
    *("lora_", "base_layer", "original_module", "modules_to_save", "ia3_", "hada_", "lokr_"),
    *("oft_", "vera_"),
)
# Parts of names by which PEFT and mlx-lm mark an adapter's tensors and the weights under them.
_PART = re.compile(
    r"(?:^|\.)(?:lora_(?:[ABab]|embedding_[AB]|magnitude_vector)|base_layer|original_module"
    r"|modules_to_save|ia3_l|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|b?oft_[rRsS]"
    r"|vera_lambda_[bd])(?:\.|$)"
)


def adapter_file(folder: Path) -> str | None:
    """Return the name of an adapter's file in the folder, or None."""
    return next((name for name in FILES if os.path.lexists(folder / name)), None)


def adapter_tensors(names: Iterable[str]) -> list[str]:
    """Return the names that belong to an unmerged adapter."""
    every = "\n".join(names)
    if not any(mark in every for mark in _MARKS):
        return []  # Finding text is a hundred times faster than the pattern, in 90,000 names.
    return [name for name in every.split("\n") if _PART.search(name)]


def adapter_alone(folder: Path) -> FileFault | None:
    """Return the fault of a folder that has an adapter; the caller found no weights in it."""
    name = adapter_file(folder)
    if name is None:
        return None
    return FileFault(
        "adapter-alone",
        f"{name}: the folder holds an adapter alone, where the weights of a model were expected "
        "(model*.safetensors)",
        MERGE,
    )
