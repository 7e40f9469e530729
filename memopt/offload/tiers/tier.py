"""What a swap tier must offer."""

from __future__ import annotations

import torch
from torch import Tensor


class Slot:
    """The first bytes of a storage, or all of them, in a tier; freed when nobody refers to it any more.

    Attributes:
        storage_bytes, moved_bytes: of the storage, and of what is here.
        device: where the storage lies.
    """

    def __init__(self, tensor: Tensor, moved_bytes: int | None) -> None:
        self.storage_bytes, self.device = tensor.untyped_storage().nbytes(), tensor.device
        self.moved_bytes = self.storage_bytes if moved_bytes is None else moved_bytes

    def empty(self) -> Tensor:
        """A new flat uint8 tensor of the storage's bytes, on its device."""
        return torch.empty(self.storage_bytes, dtype=torch.uint8, device=self.device)

    def prefetch(self) -> None:
        """It will be asked for soon: begin to bring it back, where that can go on beside other work."""

    def forget(self) -> None:
        """It will not be asked for soon after all: let go of what has been brought back."""

    def get(self) -> Tensor:
        """A new flat uint8 tensor of the storage's bytes, on its device; only those that are here are filled in."""
        raise NotImplementedError


class Tier:
    """A place for swapped storages.

    Attributes:
        held_bytes: now in the tier.
        moved_bytes: put into the tier since it was opened.
        stall_seconds: how long compute waited for copies.
        prefetch_bytes: what the tier by itself may bring back ahead of need, at most, where it knows how.
    """

    held_bytes = 0
    moved_bytes = 0
    stall_seconds = 0.0
    prefetch_bytes = 0

    def put(self, tensor: Tensor, moved_bytes: int | None = None) -> Slot:
        """Take a copy of the tensor's whole storage, or of its first bytes; it may be freed as soon as this returns."""
        raise NotImplementedError

    def new_step(self) -> None:
        """A training step begins."""

    def block_ended(self) -> None:
        """A planned block's forward has ended."""


def first_bytes(tensor: Tensor, count: int) -> Tensor:
    """The first bytes of a tensor's storage, without a copy."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), 0, (count,), (1,))
