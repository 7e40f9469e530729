"""What a swap tier must offer."""

from __future__ import annotations

from torch import Tensor


class Slot:
    """One storage's bytes in a tier; freed when nobody refers to it any more."""

    def get(self) -> Tensor:
        """A new flat uint8 tensor of the bytes, on the device that they came from."""
        raise NotImplementedError


class Tier:
    """A place for swapped storages.

    Attributes:
        held_bytes: now in the tier.
        moved_bytes: put into the tier since it was opened.
        stall_seconds: how long compute waited for copies.
    """

    held_bytes = 0
    moved_bytes = 0
    stall_seconds = 0.0

    def put(self, tensor: Tensor) -> Slot:
        """Take a copy of the tensor's whole storage; the storage may be freed as soon as this returns."""
        raise NotImplementedError

    def new_step(self) -> None:
        """A training step begins."""
