"""The disk tier: one scratch file, its space handed out in extents and used again.

The file is written with ``pwrite`` and read with ``pread``, straight between the disk's cache and the tensor's memory:
a mapping of the file would answer a full disk with a signal that kills the process, where these return an error. The
file has no name from the moment it is open, so that it goes with the process, however that ends; a crash in the
instant between making and un-naming it leaves a file that the next start finds by its name and its lost lock, and
removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import tempfile
import threading
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from memopt.offload.errors import SwapError
from memopt.offload.tiers.tier import Slot, Tier, first_bytes

PREFIX = "memopt-swap-"
_ALIGNMENT = 4096


class DiskSlot(Slot):
    """An extent of the scratch file."""

    def __init__(self, tier: DiskTier, tensor: Tensor, moved_bytes: int | None) -> None:
        super().__init__(tensor, moved_bytes)
        self._tier = tier
        self._offset, self._length = tier.allocate(self.moved_bytes)
        storage = tensor.untyped_storage()
        try:
            if storage.device.type == "cpu":
                tier.write(self._offset, storage.data_ptr(), self.moved_bytes)
            else:
                copy = first_bytes(tensor, self.moved_bytes).to("cpu")
                tier.write(self._offset, copy.data_ptr(), self.moved_bytes)
        except BaseException:
            tier.free(self._offset, self._length)
            del self._length
            raise
        tier.held_bytes += self.moved_bytes
        tier.moved_bytes += self.moved_bytes

    def get(self) -> Tensor:
        """A new tensor of the bytes, read from the file."""
        flat = self.empty()
        if self.device.type == "cpu":
            self._tier.read(self._offset, flat.data_ptr(), self.moved_bytes)
        else:
            copy = torch.empty(self.moved_bytes, dtype=torch.uint8)
            self._tier.read(self._offset, copy.data_ptr(), self.moved_bytes)
            flat[: self.moved_bytes].copy_(copy)
        return flat

    def __del__(self) -> None:
        if hasattr(self, "_length"):
            self._tier.free(self._offset, self._length)
            self._tier.held_bytes -= self.moved_bytes


class DiskTier(Tier):
    """A scratch file in a folder.

    Args:
        folder: where; it must exist and be writable.
        limit_bytes: the most that the file may hold.

    Raises:
        ValueError: the folder cannot be used; the message says why.
    """

    def __init__(self, folder: Path, limit_bytes: int | None) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        remove_leftovers(folder)
        try:
            self._file, name = scratch_file(folder)
        except OSError as error:
            raise ValueError(
                f"swap folder {folder} cannot be used ({error.strerror}); give an existing, writable folder"
            ) from error
        os.unlink(name)
        self._free: list[tuple[int, int]] = []
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.RLock()
        self._end = 0

    def put(self, tensor: Tensor, moved_bytes: int | None = None) -> Slot:
        """Write the storage."""
        return DiskSlot(self, tensor, moved_bytes)

    def allocate(self, size: int) -> tuple[int, int]:
        """The first free extent that is long enough, or new space at the end: (offset, length).

        Raises:
            SwapError: the limit is reached or the disk is full.
        """
        length = max(1, -(-size // _ALIGNMENT)) * _ALIGNMENT
        with self._lock:
            return self._allocate(length)

    def _allocate(self, length: int) -> tuple[int, int]:
        for n, (offset, room) in enumerate(self.free_extents()):
            if room >= length:
                if room == length:
                    del self._free[n]
                else:
                    self._free[n] = (offset + length, room - length)
                return offset, length
        if self.limit_bytes is not None and self._end + length > self.limit_bytes:
            raise SwapError(
                f"swap tier disk: its file holds {self._end} bytes and {length} more would exceed its limit of "
                f"{self.limit_bytes} bytes; raise the limit, or plan with less swapping"
            )
        offset = self._end
        try:
            os.posix_fallocate(self._file, offset, length)
        except OSError as error:
            raise self._failed("make room for", length, error) from error
        self._end += length
        return offset, length

    def free(self, offset: int, length: int) -> None:
        """Take an extent back: noted only, because slots die in other threads, and in the middle of anything."""
        self._returned.append((offset, length))

    def free_extents(self) -> list[tuple[int, int]]:
        """What may be handed out, (offset, length) in order, with what has come back in the meantime; none touch."""
        with self._lock:
            if self._returned:
                self._join_returned()
            return self._free

    def _join_returned(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort()
        joined: list[tuple[int, int]] = []
        for start, room in self._free:
            if joined and joined[-1][0] + joined[-1][1] == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((start, room))
        self._free = joined

    def write(self, offset: int, address: int, size: int) -> None:
        """Copy memory into the file."""
        memory = memoryview((ctypes.c_char * size).from_address(address)) if size else memoryview(b"")
        done = 0
        while done < size:
            try:
                done += os.pwrite(self._file, memory[done:], offset + done)
            except OSError as error:
                raise self._failed("write", size, error) from error

    def read(self, offset: int, address: int, size: int) -> None:
        """Copy a part of the file into memory."""
        memory = memoryview((ctypes.c_char * size).from_address(address)) if size else memoryview(b"")
        done = 0
        while done < size:
            try:
                got = os.preadv(self._file, [memory[done:]], offset + done)
            except OSError as error:
                raise self._failed("read", size, error) from error
            if got == 0:
                raise SwapError(
                    f"swap tier disk: its file in {self.folder} ends {size - done} bytes early; something else has "
                    "truncated it. Choose a folder that nothing else cleans"
                )
            done += got

    def _failed(self, doing: str, size: int, error: OSError) -> SwapError:
        remedy = "choose another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free space there, choose another folder, or plan with less swapping"
        return SwapError(
            f"swap tier disk: cannot {doing} {size} bytes in {self.folder} ({error.strerror}); {self.held_bytes} bytes "
            f"are held there; {remedy}"
        )

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def scratch_file(folder: Path) -> tuple[int, str]:
    """A new file, open and locked, and its name, which is to be taken away as soon as it is not needed.

    Raises:
        OSError: the folder does not take it.
    """
    while True:
        file, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:
                return file, name
        except BaseException:
            os.close(file)
            raise
        # Before it was locked, another start has taken it for a leftover and removed it.
        os.close(file)


def remove_leftovers(folder: Path) -> None:
    """Remove the scratch files of processes that died: those whose lock nobody holds."""
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(found)


def open_tier(folder: str | os.PathLike[str] | None, limit_bytes: int | None) -> DiskTier:
    """The tier in a folder, by default the one for temporary files."""
    return DiskTier(Path(folder if folder is not None else tempfile.gettempdir()), limit_bytes)
