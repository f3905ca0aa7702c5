"""Resolve a command-line argument to a folder: a path, one shard, or a cached repository.

The hub's cache is read directly, since huggingface_hub may not be installed. Its layout is
``models--ORG--NAME/{refs,snapshots,blobs}``, files of a snapshot are links
into ``blobs``, and ``refs/main`` names the snapshot.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_moe_compat.checkpoint.files import UnreadableError, read_bytes
from vllm_moe_compat.errors import SettingError

_REPOSITORY = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?:@[\w./-]+)?", re.ASCII)
_COMMIT = re.compile(r"[\w-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Location:
    """A checkpoint on this machine.

    Attributes:
        folder: its folder.
        shard: the only file that the argument names; None for all.
        repository: its id on the hub, if it was found in the hub's cache by that id.
    """

    folder: Path
    shard: Path | None = None
    repository: str | None = None


def locate(name: str) -> Location:
    """Find the checkpoint that the argument names.

    Raises:
        SettingError: there is none.
    """
    if not name:
        raise SettingError("the checkpoint's name is empty; name a folder.")
    try:
        path = Path(name).expanduser()
        whole = path.suffix != ".safetensors" or (path / "config.json").exists()
        if path.is_dir() and whole:
            return Location(_snapshot(path, "main") or path)
        if path.suffix == ".safetensors" and os.path.lexists(path):
            return Location(path.parent, path)
        there = os.path.lexists(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingError(f"{name!r} cannot be accessed ({error}); name a folder.") from error
    if there:
        raise SettingError(
            f"{name!r} is neither a folder nor a .safetensors file; name the checkpoint's folder."
        )
    if not _REPOSITORY.fullmatch(name) or ".." in name:
        raise SettingError(f"{name!r} does not exist; name an existing folder.")
    repository, _, revision = name.partition("@")
    cached = hub_cache() / f"models--{repository.replace('/', '--')}"
    folder = _snapshot(cached, revision or "main")
    if folder is None:
        download = f"hf download {repository}{f' --revision {revision}' if revision else ''}"
        raise SettingError(
            f"{name!r} is neither a folder nor in the hub's cache, {hub_cache()}; download it with "
            f"`{download}`, or set HF_HUB_CACHE to the cache that has it."
        )
    return Location(folder, repository=repository)


def hub_cache() -> Path:
    """Return the folder of huggingface_hub's downloads."""
    if own := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(own)).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def _snapshot(cached: Path, revision: str) -> Path | None:
    """Return the snapshot of a revision (a branch, a tag, a commit) in a cached repository."""
    if not (cached / "snapshots").is_dir() or (cached / "config.json").exists():
        return None
    commit = revision
    with suppress(UnreadableError, ValueError):  # a commit has no file in refs
        commit = read_bytes(cached / "refs" / revision, 200).decode("ascii").strip()
    folder = cached / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None
