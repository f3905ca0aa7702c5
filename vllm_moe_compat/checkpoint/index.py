"""Compare the index file with the shards: a contradiction means an incomplete download.

mlx-lm ignores the index, so it is no source of names here either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllm_moe_compat.checkpoint.extras import Ignored
from vllm_moe_compat.checkpoint.files import (
    AGAIN,
    FileFault,
    Report,
    UnreadableError,
    read_json,
)
from vllm_moe_compat.checkpoint.headers import TensorInfo, weight_files
from vllm_moe_compat.checkpoint.names import fold

INDEX = "model.safetensors.index.json"
MAX_INDEX = 128 * 2**20
"""Limit for the index, in bytes; that of 61,000 tensors has 8 million."""
_STALE = f"{AGAIN}, or delete a stale index"


def contradictions(
    model_dir: Path,
    index: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    extras: Ignored,
) -> Iterator[FileFault]:
    """Yield a fault for each file of the index whose tensors the shards do not hold.

    Extra tensors may be missing, together with their files.
    """
    missing: dict[str, str] = {}
    for name, file in index.items():
        info = tensors.get(name)
        if info is None or info.file != file:
            missing[name] = file
    missing_from: dict[str, list[str]] = {}
    for name in missing.keys() - extras.select(missing):
        missing_from.setdefault(missing[name], []).append(name)
    for file, names in sorted(missing_from.items()):
        yield _contradiction(model_dir, file, sorted(names))


def read_index(model_dir: Path, report: Report) -> dict[str, str] | None:
    """Return tensor → file by the index, without paths that leave the folder.

    None if there is no readable index.
    """
    path = model_dir / INDEX
    if not os.path.lexists(path):
        return None
    try:
        index, twice = read_json(path, MAX_INDEX)
    except UnreadableError as error:
        report(FileFault("index-unreadable", f"{INDEX}: not readable as JSON ({error})"))
        return None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        what = "no weight_map from tensor names to file names was found in it"
        report(FileFault("index-unreadable", f"{INDEX}: {what}"))
        return None
    if twice:
        found = f"it has {fold(twice)} twice, where each tensor was expected once"
        report(FileFault("index-duplicate", f"{INDEX}: {found}", _STALE))
    if outside := sorted({file for file in weight_map.values() if _is_outside(file)}):
        more = f" and {len(outside) - 1} more such files" if len(outside) > 1 else ""
        report(
            FileFault(
                "index-outside",
                f"{INDEX}: it names {outside[0]!r}{more}, which lies outside the checkpoint's "
                "folder, where plain file names were expected",
                "get the checkpoint from a source you trust",
            )
        )
    return {name: file for name, file in weight_map.items() if file not in outside}


def _is_outside(file: str) -> bool:
    parts = file.replace("\\", "/").split("/")
    return not file or ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in file


def _contradiction(model_dir: Path, file: str, names: list[str]) -> FileFault:
    where = f"{INDEX}: it puts {fold(names)} in {file!r}, "
    if not os.path.exists(model_dir / file):  # not Path's: it raises where a name is too long
        return FileFault("index-missing-file", f"{where}but no such file is there", _STALE)
    if model_dir / file not in weight_files(model_dir):
        return FileFault(
            "index-other-file",
            f"{where}which mlx-lm will not load, since it takes only model*.safetensors in the "
            "folder itself",
            "rename the file and its entries in the index",
        )
    return FileFault("index-missing-tensor", f"{where}but that file does not hold them", _STALE)
