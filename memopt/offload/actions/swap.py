"""Swap: a storage's bytes, or the first of them, go to the plan's tier and come back when backward asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.offload.actions.saver import BlockCall, Saver
from memopt.offload.handles import Kept, Leaving, Piece, Stored
from memopt.offload.tiers import Tier, first_bytes
from memopt.planner.values import StorageAction, moved_bytes


class Swapped(Stored):
    """A storage in a tier; what a share below 1 leaves behind waits in a buffer of its own.

    Args:
        share: of the bytes, how much goes; rounded down to a whole number of 512 bytes.
    """

    def __init__(self, tensor: Tensor, where: str, tier: Tier, share: float = 1.0) -> None:
        super().__init__(tensor, where)
        moved = moved_bytes(self.bytes, share)
        self._rest = None if moved == self.bytes else first_bytes(tensor, self.bytes)[moved:].clone()
        self._slot = tier.put(tensor, moved)

    def fetch(self) -> Tensor:
        """The bytes, from the tier and the rest."""
        flat = self._slot.get()
        if self._rest is not None:
            flat[self._slot.moved_bytes :].copy_(self._rest)
            if not self.is_source and not torch._C._autograd._get_current_graph_task_keep_graph():
                self._rest = None
        return flat


class Swap(Saver):
    """Moves each storage once, however many saved tensors lie over it.

    Args:
        share: of each storage's bytes, how much goes.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def save(self, call: BlockCall, number: int, tensor: Tensor) -> Piece | Kept:
        """The first tensor over a storage moves it; layouts that bytes alone do not describe are kept."""
        if self._stays(tensor):
            return Kept(tensor, call.where)
        index = call.storage_of(number)
        stored = call.stored.get(index)
        if stored is None or not stored.is_of(tensor):
            stored = call.stored[index] = self.moved(call, tensor)
        return Piece(stored, tensor)

    def save_input(self, call: BlockCall, tensor: Tensor) -> Kept:
        """A tensor over an input, which goes when the block's forward has ended."""
        if self._stays(tensor):
            return Kept(tensor, call.where)
        handle = Leaving(tensor, call.where)
        call.leaving.append((self, handle))
        return handle

    def moved(self, call: BlockCall, tensor: Tensor) -> Stored:
        """The tensor's storage, on its way to the tier."""
        return Swapped(tensor, call.where, call.tier, self.share)

    def _stays(self, tensor: Tensor) -> bool:
        size = tensor.untyped_storage().nbytes()
        return tensor.dtype.is_complex or moved_bytes(size, self.share) == 0


def make(action: StorageAction) -> Swap:
    """The saver."""
    return Swap(action.fraction)
