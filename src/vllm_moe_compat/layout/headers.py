"""Names, shapes and dtypes of every tensor, from the safetensors headers alone.

Exactly the files that mlx-lm loads are read (``model*.safetensors``), by
safetensors' own reader, which validates them: a truncated or corrupt shard stops
here, by name, before a tensor is touched. MLX cannot stand in for it, since it
calls E4M3, E8M0 and plain bytes all ``uint8``.

The index file is no source, because mlx-lm ignores it; it is checked against
the shards, because a contradiction means an incomplete download.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_compat.errors import CheckpointFileError
from vllm_moe_compat.layout.extras import EVERY_SPELLING, Ignored
from vllm_moe_compat.layout.names import fold

INDEX = "model.safetensors.index.json"
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it.

    Attributes:
        dtype: safetensors' name for it: ``F8_E4M3``, ``BF16``, ``U8``, …
        shape: as stored.
        file: the shard's file name; empty for a tensor that came without a file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str = ""


def weight_files(model_dir: Path) -> list[Path]:
    """Return the files that mlx-lm will load, found as it finds them."""
    return sorted(Path(name) for name in glob.glob(str(model_dir / "model*.safetensors")))


def read_headers(model_dir: Path) -> dict[str, TensorInfo]:
    """Read the headers of all shards; no shard at all gives an empty dict.

    Raises:
        CheckpointFileError: a shard cannot be read, or a tensor is in two.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(model_dir):
        file = path.name
        try:
            with safe_open(path, framework="numpy") as shard:
                # In the file's order: the names' order is that of the messages.
                for name in shard.offset_keys():
                    view = shard.get_slice(name)
                    info = TensorInfo(view.get_dtype(), tuple(view.get_shape()), file)
                    if (twin := tensors.setdefault(name, info)) is not info:
                        raise CheckpointFileError(
                            f"{file}: {name} is in {twin.file} too, where one shard was expected "
                            f"to hold it; remove the file that is not part of the checkpoint."
                        )
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, CheckpointFileError):
                raise
            raise CheckpointFileError(
                f"{file}: not a readable safetensors file ({error}); the download may be "
                f"incomplete, so {_AGAIN}."
            ) from error
    return tensors


def check_index(
    model_dir: Path,
    tensors: Mapping[str, TensorInfo],
    extras: Ignored = EVERY_SPELLING,
) -> None:
    """Compare the index, where there is one, with what the shards hold.

    Tensors that upstream ignores may be missing, files and all.

    Raises:
        CheckpointFileError: the index is unreadable or contradicts the shards.
    """
    path = model_dir / INDEX
    if not path.exists():
        return
    missing: dict[str, str] = {}
    for name, file in _weight_map(path).items():
        info = tensors.get(name)
        if info is None or info.file != file:
            missing[name] = file
    missing_from: dict[str, list[str]] = {}
    for name in missing.keys() - extras.select(missing):
        missing_from.setdefault(missing[name], []).append(name)
    for file, names in sorted(missing_from.items()):
        raise CheckpointFileError(_contradiction(model_dir, file, sorted(names)))


def _weight_map(path: Path) -> dict[str, str]:
    """Return the index's map from tensor to file, checked for shape and safety."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointFileError(f"{INDEX}: not readable as JSON ({error}); {_AGAIN}.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointFileError(
            f"{INDEX}: no weight_map from tensor names to file names was found in it; {_AGAIN}."
        )
    for file in set(weight_map.values()):
        parts = file.replace("\\", "/").split("/")
        if not file or ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in file:
            raise CheckpointFileError(
                f"{INDEX}: it names {file!r}, which lies outside the checkpoint's folder, where "
                "plain file names were expected; get the checkpoint from a source you trust."
            )
    return weight_map


def _contradiction(model_dir: Path, file: str, names: list[str]) -> str:
    where = f"{INDEX}: it puts {fold(names)} in {file!r}, "
    if not (model_dir / file).exists():
        return f"{where}but no such file is there; {_AGAIN}, or delete a stale index."
    if model_dir / file not in weight_files(model_dir):
        return (
            f"{where}which mlx-lm will not load, since it takes only model*.safetensors in the "
            "folder itself; rename the file and its entries in the index."
        )
    return f"{where}but that file does not hold them; {_AGAIN}, or delete a stale index."
