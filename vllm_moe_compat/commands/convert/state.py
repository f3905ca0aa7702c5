"""Which conversion a partial folder belongs to, and what it has finished.

Shards are kept only if a new run would write the same bytes: from the same files, with the same
settings, the same plan, the same versions, on the same kind of device.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_moe_compat import __version__
from vllm_moe_compat.checkpoint.files import UnreadableError, opened
from vllm_moe_compat.checkpoint.operations import Spec
from vllm_moe_compat.rewrite.shards import Checksums

FORMAT = 1
_PACKAGES = ("mlx", "mlx-lm", "transformers")
# What a load reads. Other files are copied anew by every run.
_READ = (".safetensors", ".json", ".py")


@dataclass(frozen=True, slots=True)
class State:
    """The state of a conversion.

    Attributes:
        source: file → size, time of the last change, digest of a safetensors header.
        settings: name → value, as JSON holds it.
        plan: digest of all tensors to write.
        versions: package or device → version.
        shards: finished shard → checksums.
    """

    source: Mapping[str, Any]
    settings: Mapping[str, Any]
    plan: str
    versions: Mapping[str, str]
    shards: dict[str, Checksums] = field(default_factory=dict)

    def text(self) -> str:
        """Return the state as JSON."""
        return json.dumps(
            {
                "format": FORMAT,
                "source": self.source,
                "settings": self.settings,
                "plan": self.plan,
                "versions": self.versions,
                "shards": self.shards,
            }
        )

    def difference(self, now: State) -> str:
        """Return what differs between this earlier state and the present one; empty if nothing."""
        if (name := changed(self.source, now.source)) is not None:
            return f"{name} of the source has changed"
        for before, after in ((self.settings, now.settings), (self.versions, now.versions)):
            if (name := changed(before, after)) is not None:
                return f"{name} was {before.get(name)}, and is {after.get(name)}"
        return "" if self.plan == now.plan else "another set of tensors was written"


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return the first key whose values differ."""
    names = sorted(before.keys() | after.keys())
    return next((name for name in names if before.get(name) != after.get(name)), None)


def state_of(
    source: Path, settings: Mapping[str, Any], specs: Mapping[str, Spec], form: str
) -> State:
    """Return the state of a conversion that has finished nothing.

    Args:
        source: the checkpoint's folder.
        settings: what determines the written bytes; values as JSON holds them.
        specs: every tensor to write, in the order of the files.
        form: the form of the result in words.
    """
    import mlx.core as mx

    plan = json.dumps([form, [(name, s.dtype, s.shape) for name, s in specs.items()]])
    found = {"vllm-moe-compat": __version__, "device": str(mx.default_device())}
    found |= {name: metadata.version(name) for name in _PACKAGES}
    return State(files_of(source), settings, hashlib.sha256(plan.encode()).hexdigest(), found)


def files_of(source: Path) -> dict[str, Any]:
    """Return size, time and header's digest of each file that a load reads; and the folder."""
    found: dict[str, Any] = {"folder": os.path.realpath(source)}
    for path in sorted(source.iterdir()):
        if not path.name.endswith(_READ) or path.name.startswith("."):
            continue
        try:
            descriptor = opened(path)
        except UnreadableError:  # not a file; the load says what is wrong with one it needs
            continue
        try:
            stat = os.fstat(descriptor)
            found[path.name] = [stat.st_size, stat.st_mtime_ns]
            if path.name.endswith(".safetensors"):
                length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
                header = os.pread(descriptor, min(length, stat.st_size), 8)
                found[path.name].append(hashlib.sha256(header).hexdigest())
        finally:
            os.close(descriptor)
    return found


def read_state(path: Path) -> tuple[State | None, str]:
    """Read a state.

    Returns:
        The state, and an empty string; or None, and why there is none. Both are empty if
        there is no file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            return None, "another version of convert wrote it"
        return State(**found), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"its state cannot be read ({type(error).__name__})"
