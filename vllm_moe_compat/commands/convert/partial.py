"""The partial folder of a conversion: locked, kept when it can be resumed, renamed at the end.

::

    .NAME.partial/lock            locked by the running conversion
    .NAME.partial/state.json      which conversion it is, and its finished shards
    .NAME.partial/config.json     and the index, kept apart: nothing loads shards without them
    .NAME.partial/unfinished/     the shards; renamed to NAME at the end

The kernel releases the lock when the process ends, however it ends. The state is replaced as a
whole after each shard, so it never names a shard that is not on the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_moe_compat.commands.convert.state import State, read_state
from vllm_moe_compat.errors import CompatError, InsufficientMemoryError, SettingError
from vllm_moe_compat.log import logger
from vllm_moe_compat.rewrite.shards import Checksums, DamagedShardError, sync

_LOCK, _STATE, _NEW_STATE, _WORK = "lock", "state.json", "state.json.new", "unfinished"
_ATTEMPTS = 10


def partial_of(target: Path) -> Path:
    """Return the folder in which the conversion works."""
    there = target.resolve()
    return there.with_name(f".{there.name}.partial")


class Partial:
    """A locked partial folder.

    Args:
        target: the target folder.

    Attributes:
        target: as given.
        folder: the partial folder.
        work: the folder to write into; exists after ``begin``.
        state: identity and finished shards of the conversion; None before ``begin``.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = partial_of(target)
        self.work = self.folder / _WORK
        self.state: State | None = None

    def begin(self, state: State) -> None:
        """Keep what an earlier run of the same conversion finished, and remove the rest.

        Args:
            state: the identity of this conversion; its shards are set to the finished ones.

        Raises:
            OSError: the disk is full or fails.
        """
        earlier, problem = read_state(self.folder / _STATE)
        if earlier is not None:
            problem = earlier.difference(state)
            if not problem:
                state.shards.update(earlier.shards)
        if problem:
            logger.warning("%s is started over: %s", self.folder, problem)
        self.state = state
        self.trim()
        self._save()
        self.work.mkdir(exist_ok=True)

    def trim(self) -> None:
        """Remove everything from ``work`` but the finished shards."""
        kept = self.state.shards if self.state is not None else {}
        for path in list(self.work.iterdir()) if self.work.is_dir() else []:
            if path.name not in kept:
                _remove(path)

    def finished(self, file: str, checksums: Checksums) -> None:
        """Record a shard that is on the disk."""
        assert self.state is not None, "begun"
        self.state.shards[file] = checksums
        try:
            self._save()
        except OSError:
            del self.state.shards[file]
            raise

    def _save(self) -> None:
        assert self.state is not None, "begun"
        new = self.folder / _NEW_STATE
        new.write_text(self.state.text(), encoding="utf-8")
        sync(new)
        os.replace(new, self.folder / _STATE)
        sync(self.folder)

    def set_aside(self, names: tuple[str, ...]) -> None:
        """Move files out of ``work`` until ``put_back``."""
        for name in names:
            os.replace(self.work / name, self.folder / name)

    def put_back(self, names: tuple[str, ...]) -> None:
        """Undo ``set_aside``."""
        for name in names:
            os.replace(self.folder / name, self.work / name)

    def publish(self) -> None:
        """Rename ``work`` to the target.

        Raises:
            OSError: it fails, for instance since the target was filled in the meantime.
        """
        there = self.target.resolve()
        sync(self.work)
        os.rename(self.work, there)
        sync(there.parent)

    def keeps(self, error: BaseException) -> bool:
        """Whether a conversion that ends with this error can be resumed.

        The shard of a ``DamagedShardError`` no longer counts as finished.
        """
        if self.state is None:  # What an earlier run left was not touched.
            earlier, _ = read_state(self.folder / _STATE)
            return earlier is not None and bool(earlier.shards)
        if isinstance(error, DamagedShardError):
            self.state.shards.pop(error.file, None)
            self._save()
        elif isinstance(error, CompatError) and not isinstance(
            error, InsufficientMemoryError | SettingError
        ):
            return False
        return bool(self.state.shards)


def counted(number: int, noun: str) -> str:
    """Return ``1 shard`` or ``2 shards``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextmanager
def partial_folder(target: Path, *, replace: bool = False) -> Iterator[Partial]:
    """Yield the locked partial folder; remove it at the end, or keep it to be resumed.

    An exception after which it is kept gets a note that says how to go on.

    Args:
        target: the target folder.
        replace: whether what an earlier conversion left is removed first.

    Raises:
        SettingError: another conversion to the target is running, or the folder holds
            something else.
        OSError: the disk is full or fails.
    """
    partial = Partial(target)
    partial.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(partial.folder, target)
    try:
        others = sorted({p.name for p in partial.folder.iterdir()} - {_LOCK, _NEW_STATE})
        if replace:
            for name in others:
                _remove(partial.folder / name)
        elif others and _STATE not in others:
            raise SettingError(
                f"{partial.folder} holds {others[0]}, where what an interrupted conversion leaves "
                "was expected; add --replace-partial to remove the folder."
            )
        try:
            yield partial
        except BaseException as error:
            if not partial.keeps(error):
                shutil.rmtree(partial.folder, ignore_errors=True)
            elif partial.state is not None:
                partial.trim()
                error.add_note(
                    f"{counted(len(partial.state.shards), 'finished shard')} kept in "
                    f"{partial.folder}; the same command goes on there"
                )
            raise
        shutil.rmtree(partial.folder, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(folder: Path, target: Path) -> int:
    """Create the folder where it is missing; return the descriptor that holds its lock."""
    path = folder / _LOCK
    for _ in range(_ATTEMPTS):
        try:
            folder.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # A conversion that ended has removed the folder.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise SettingError(
                f"another conversion to {target} is running, where one at a time was expected; "
                "wait for it, or name another folder."
            ) from error
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise SettingError(f"{path} could not be locked; try again, or name another folder.")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
