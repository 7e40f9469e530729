"""Optimizer states in memory-mapped files: the system writes them back to the disk, and drops them, as it needs room.

The states of one parameter share a file, which has no name from the moment it is mapped: it goes with the process. A
crash in the instant before leaves a file that the next start finds by its name and its lost lock, and removes.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from memopt.offload.errors import SwapError
from memopt.offload.tiers.disk import remove_leftovers, scratch_file

_ALIGNMENT = 64


class MappedStates:
    """Moves the states of optimizers into files of a folder.

    Args:
        folder: where; it must exist and be writable. By default the folder for temporary files.

    Raises:
        ValueError: the folder cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = Path(folder if folder is not None else tempfile.gettempdir())
        self.mapped_bytes = 0
        remove_leftovers(self.folder)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"state folder {self.folder} cannot be used; give an existing, writable folder")

    def take(self, optimizer: Optimizer) -> None:
        """Move the states that are not mapped yet, as after the first step, or after a state dict was loaded.

        Raises:
            SwapError: the disk is full or fails; the states stay in memory.
        """
        for parameter, stored in list(optimizer.state.items()):
            leaves, structure = pytree.tree_flatten(stored)
            loose = [n for n, leaf in enumerate(leaves) if _is_state(leaf) and not leaf.is_shared()]
            if loose:
                for n, mapped in zip(loose, self._mapped([leaves[n] for n in loose]), strict=True):
                    leaves[n] = mapped
                # A new mapping: optimizers that keep what they gathered see that it is another one.
                optimizer.state[parameter] = pytree.tree_unflatten(leaves, structure)

    def _mapped(self, tensors: list[Tensor]) -> list[Tensor]:
        reaches = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 for t in tensors]
        sizes = [reach * t.element_size() for reach, t in zip(reaches, tensors, strict=True)]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        flat = self._map(starts[-1])
        found = []
        for tensor, start, size in zip(tensors, starts, sizes, strict=False):
            part = flat[start : start + size].view(tensor.dtype)
            found.append(part.as_strided(tensor.shape, tensor.stride(), part.storage_offset()).copy_(tensor))
        self.mapped_bytes += starts[-1]
        return found

    def _map(self, size: int) -> Tensor:
        file = -1
        try:
            file, name = scratch_file(self.folder)
            try:
                os.posix_fallocate(file, 0, size)
                flat: Tensor = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            finally:
                os.unlink(name)
        except OSError as error:
            raise SwapError(
                f"optimizer states: cannot make room for {size} bytes in {self.folder} ({error.strerror}); "
                f"{self.mapped_bytes} bytes are there; free space, or choose another folder"
            ) from error
        finally:
            if file >= 0:
                os.close(file)
        return flat


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's states."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor))


def _is_state(leaf: Any) -> bool:
    """Whether a value is worth moving: counters are not."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.numel() > 0
