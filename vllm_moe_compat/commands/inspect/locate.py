"""From what the user typed to a folder: a path, one shard, or a repository in the cache.

The hub's cache is resolved by hand, since huggingface_hub need not be installed: its
layout is ``models--ORG--NAME/{refs,snapshots,blobs}``, files of a snapshot are links
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
class Place:
    """What is to be inspected.

    Attributes:
        folder: of the checkpoint.
        shard: the one file that was named; None for all.
        repository: its id, where it is one of the cache's.
    """

    folder: Path
    shard: Path | None = None
    repository: str | None = None


def locate(name: str) -> Place:
    """Find what a name stands for.

    Raises:
        SettingError: nothing here.
    """
    if not name:
        raise SettingError("no checkpoint is named; name a folder.")
    try:
        path = Path(name).expanduser()
        whole = path.suffix != ".safetensors" or (path / "config.json").exists()
        if path.is_dir() and whole:
            return Place(_snapshot(path, "main") or path)
        if path.suffix == ".safetensors" and os.path.lexists(path):
            return Place(path.parent, path)
        there = os.path.lexists(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingError(f"{name!r} cannot be looked at ({error}); name a folder.") from error
    if there:
        raise SettingError(
            f"{name!r} is neither a folder nor a .safetensors file; name the checkpoint's folder."
        )
    if not _REPOSITORY.fullmatch(name) or ".." in name:
        raise SettingError(f"{name!r} is not there; name a folder that is.")
    repository, _, revision = name.partition("@")
    cached = hub_cache() / f"models--{repository.replace('/', '--')}"
    folder = _snapshot(cached, revision or "main")
    if folder is None:
        raise SettingError(
            f"{name!r} is no folder here and not in the hub's cache, {hub_cache()}; download it "
            f"with `hf download {repository}`, or set HF_HUB_CACHE to where it is."
        )
    return Place(folder, repository=repository)


def hub_cache() -> Path:
    """Return the folder where huggingface_hub keeps what it has downloaded."""
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
    with suppress(UnreadableError, ValueError):  # a commit has no file of its own
        commit = read_bytes(cached / "refs" / revision, 200).decode("ascii").strip()
    folder = cached / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None
