"""Installed distributions as an installer leaves them: a module, metadata, entry points."""

from __future__ import annotations

from pathlib import Path

PLATFORM = """
from vllm.platforms.interface import UnspecifiedPlatform
class Platform(UnspecifiedPlatform):
    pass
"""
"""A module with a platform class that vLLM can make."""


def distribution(folder: Path, name: str, module: str, text: str, **groups: str) -> Path:
    """Write a distribution into a folder of a search path; return the folder.

    Args:
        folder: the folder; may hold further distributions.
        name: of the distribution.
        module: of its only package.
        text: of the package's ``__init__.py``.
        groups: ``platform_plugins="metal = vllm_metal:register"``, without ``vllm.``.
    """
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(text)
    about = folder / f"{name.replace('-', '_')}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    entries = [f"[vllm.{group}]\n{entry}\n" for group, entry in groups.items()]
    (about / "entry_points.txt").write_text("\n".join(entries))
    return folder
