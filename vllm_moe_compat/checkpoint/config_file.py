"""Read ``config.json`` and its like from an untrusted folder, within limits.

A pipe, a device, an oversized file and JSON nested beyond ``files.MAX_DEPTH`` are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_moe_compat.checkpoint.files import AGAIN, UnreadableError, read_json
from vllm_moe_compat.errors import CheckpointFileError

CONFIG = "config.json"
MAX_CONFIG = 16 * 2**20
"""Limit in bytes; published configs have a few thousand."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UnreadableError: the file is unreadable, too large or too deep, or holds no object.
    """
    value, _ = read_json(path, MAX_CONFIG)
    if not isinstance(value, dict):
        raise UnreadableError(f"it is a {type(value).__name__}, where an object was expected")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a checkpoint.

    Raises:
        CheckpointFileError: see ``read_object``.
    """
    path = folder / CONFIG
    try:
        return read_object(path)
    except UnreadableError as error:
        raise CheckpointFileError(f"{path}: {error}; {AGAIN}.") from error
