"""Links in a checkpoint's folder, and whether they leave it.

A snapshot in the hub's cache, ``models--ORG--NAME/snapshots/COMMIT``, consists of links into
``models--ORG--NAME/blobs``; those stay within the checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path


def outside_target(path: Path, folder: Path) -> Path | None:
    """Return the file that ``path`` resolves to if it lies outside the checkpoint.

    Args:
        path: a path below ``folder``; a link, or below a folder that is one.
        folder: the checkpoint's folder, which may be a link itself.

    Returns:
        The resolved path; None if it is in the folder or in the blobs of its cache.
    """
    target = Path(os.path.realpath(path))
    root = Path(os.path.realpath(folder))
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    return None if any(target.is_relative_to(home) for home in homes) else target
