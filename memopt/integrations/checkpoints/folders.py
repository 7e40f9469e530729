"""Checkpoint folders: named by step, complete or not there.

``step-000000100`` is complete. What is being written is ``.step-000000100.partial``: it gets its name by one rename,
after everything in it has reached the disk. What is replaced or deleted leaves its name by one rename, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import weakref
from pathlib import Path
from typing import ClassVar

NAME = re.compile(r"step-(\d{9,})")
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
OWN = ("checksums.json", "model.safetensors", "rank-00000.pt")  # by which a checkpoint is known, whole or damaged


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def partial_of(folder: Path, step: int) -> Path:
    return folder / f".step-{step:09d}{PARTIAL}"


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints, in ascending order; none where the folder does not exist."""
    if not folder.is_dir():
        return []
    found = (NAME.fullmatch(path.name) for path in folder.iterdir() if is_own(path))
    return sorted(int(match[1]) for match in found if match)


def is_own(path: Path) -> bool:
    """Whether a folder is a checkpoint; what others have given such a name is left alone."""
    return any((path / name).is_file() for name in OWN)


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None."""
    found = steps(Path(folder))
    return path_of(Path(folder), found[-1]) if found else None


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(folder: Path, step: int, keep: int) -> None:
    """Give what was written for a step its name, then delete all but the newest ``keep`` checkpoints.

    The files in it must have reached the disk. A checkpoint of the same step (of a run that went on from an earlier
    one) is replaced. Cut off anywhere, this leaves complete checkpoints under their names and :func:`sweep` the rest.
    """
    partial, path = partial_of(folder, step), path_of(folder, step)
    sync(partial)
    replaced = folder / f".{path.name}{REPLACED}"
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    others = [other for other in steps(folder) if other != step]
    for old in others[: max(0, len(others) - keep + 1)]:
        gone = folder / f".{path_of(folder, old).name}{DELETED}"
        with contextlib.suppress(OSError):  # the new one is complete; this one's turn comes again
            path_of(folder, old).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Clear away what a killed run left, but bring back a checkpoint that it had not replaced yet."""
    for path in folder.iterdir():
        name = NAME.fullmatch(path.stem.removeprefix("."))
        if not name or not path.name.startswith("."):
            continue
        if path.suffix == REPLACED and is_own(path) and not path_of(folder, int(name[1])).exists():
            path.rename(path_of(folder, int(name[1])))
        elif path.suffix in (PARTIAL, REPLACED, DELETED):
            shutil.rmtree(path, ignore_errors=True)


class WriteLock:
    """Held by the run that writes to a folder, so that no other sweeps away what it is writing.

    The system lets go of it when the process ends, however it ends. Where a file system knows no locks, all get it.
    """

    _held: ClassVar[weakref.WeakSet[WriteLock]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path) -> bool:
        """Whether it is held now; False where another run holds it."""
        if self._descriptor is None:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError:
                pass
            self._descriptor = descriptor
            self._held.add(self)
        return True

    def release(self) -> None:
        """Let others write. Safe to repeat."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # closing alone would leave it to a child that has not begun yet
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()

    @classmethod
    def _forked(cls) -> None:
        """In a child, such as a data loader's worker, which must not hold on to what its parent lets go."""
        for lock in list(cls._held):
            lock._close()


os.register_at_fork(after_in_child=WriteLock._forked)
