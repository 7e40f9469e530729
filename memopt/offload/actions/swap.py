"""Swap: the storage's bytes go to the plan's tier and come back when backward asks for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memopt.offload.actions.saver import Saver
from memopt.offload.handles import Kept, Piece, Stored
from memopt.offload.tiers import Tier
from memopt.planner.values import StorageAction


class Swapped(Stored):
    """A storage in a tier."""

    def __init__(self, tensor: Tensor, where: str, tier: Tier) -> None:
        super().__init__(tensor, where)
        self._slot = tier.put(tensor)

    def fetch(self) -> Tensor:
        """The bytes, from the tier."""
        return self._slot.get()


class Swap(Saver):
    """Moves each storage once, however many saved tensors lie over it."""

    def save(self, call: Any, number: int, tensor: Tensor) -> Piece | Kept:
        """The first tensor over a storage moves it; layouts that bytes alone do not describe are kept."""
        if tensor.dtype.is_complex or tensor.untyped_storage().nbytes() == 0:
            return Kept(tensor, call.where)
        index = call.storage_of(number)
        stored = call.stored.get(index)
        if stored is None or not stored.is_of(tensor):
            stored = call.stored[index] = Swapped(tensor, call.where, call.policy.tier)
        return Piece(stored, tensor)


def make(action: StorageAction) -> Swap:
    """The saver; there is nothing to choose."""
    return Swap()
