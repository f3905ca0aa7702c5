"""MLX's compiled kernels on the CPU, and the folder that MLX keeps them in.

MLX's CPU build compiles small kernels with g++ at first use, into ``mlx/VERSION/cpu`` of the
folder for temporary files, where later processes find them. Two faults of that folder would end
the engine with an error of the compiler or the linker: it may be read-only, full or another
user's, and a killed process or a full disk may have left half a kernel, which MLX then tries to
load for ever. So the folder is looked at before the first kernel is needed.

Without g++ MLX does without by itself, and so it does with ``MLX_DISABLE_COMPILE``.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from vllm_moe_compat.log import logger

# What g++ writes for one kernel, with room to spare.
_ROOM = 2**20
# A kernel that another process is writing is not damaged; linking takes well below a second.
_SETTLED_SECONDS = 60.0


def settle() -> None:
    """Remove damaged kernels; without a folder to write to, do without compiling."""
    if not are_compiled():
        return
    folder = kernel_folder()
    try:
        check_folder()
        damaged = [path for path in folder.glob("lib*.so") if _is_damaged(path)]
        for path in damaged:
            path.unlink(missing_ok=True)
    except OSError as error:
        mx.disable_compile()
        logger.warning(
            "MLX cannot keep compiled kernels in %s (%s), so the model is served without them, "
            "somewhat slower; free space, or set TMPDIR to a folder that can be written to",
            folder,
            error.strerror or error,
        )
        return
    if damaged:
        logger.warning(
            "%s: removed %d damaged kernel%s, which MLX will compile again",
            folder,
            len(damaged),
            "s" if len(damaged) > 1 else "",
        )


def are_compiled() -> bool:
    """Return whether MLX compiles kernels when it needs them."""
    return (
        mx.default_device().type == mx.DeviceType.cpu
        and shutil.which("g++") is not None
        and os.environ.get("MLX_DISABLE_COMPILE") is None
    )


def check_folder() -> None:
    """Check that a kernel can be written.

    Raises:
        OSError: it cannot.
    """
    folder = kernel_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as trial:
        trial.write(bytes(_ROOM))


def kernel_folder() -> Path:
    """Return the folder of MLX's kernels; it is found as C++'s ``temp_directory_path`` does."""
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    temporary = next((os.environ[name] for name in names if os.environ.get(name)), "/tmp")
    return Path(temporary) / "mlx" / version("mlx") / "cpu"


def _is_damaged(path: Path) -> bool:
    """Whether an ELF file is cut short; its table of sections is at its end."""
    if not sys.platform.startswith("linux"):
        return False
    with path.open("rb") as file:
        head = file.read(64)
        found = os.fstat(file.fileno())
    if time.time() - found.st_mtime < _SETTLED_SECONDS:
        return False
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return True
    (table,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    return bool(found.st_size < table + size * count)
