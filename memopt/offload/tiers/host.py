"""The host tier on the CPU: a plain copy in main memory.

It frees nothing where tensors lie in main memory anyway; it exists for storages of other devices, for tests, and for
plans that were made for a machine with an accelerator.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from memopt.offload.errors import SwapError
from memopt.offload.tiers.tier import Slot, Tier


class HostSlot(Slot):
    """Bytes in main memory."""

    def __init__(self, tier: HostTier, tensor: Tensor, moved_bytes: int | None) -> None:
        super().__init__(tensor, moved_bytes)
        self._tier = tier
        if tier.limit_bytes is not None and tier.held_bytes + self.moved_bytes > tier.limit_bytes:
            raise SwapError(
                f"swap tier host: {tier.held_bytes} bytes are held and {self.moved_bytes} more would exceed its limit "
                f"of {tier.limit_bytes} bytes; raise the limit, or plan with less swapping or with the disk tier"
            )
        self._copy = torch.UntypedStorage(self.moved_bytes)  # type: ignore[no-untyped-call]
        # Bare storages: a meter would count a tensor as memory of the device.
        self._copy.copy_(tensor.untyped_storage()[: self.moved_bytes])
        tier.held_bytes += self.moved_bytes
        tier.moved_bytes += self.moved_bytes

    def get(self) -> Tensor:
        """A new tensor of the bytes."""
        flat = self.empty()
        flat.untyped_storage()[: self.moved_bytes].copy_(self._copy)
        return flat

    def __del__(self) -> None:
        if hasattr(self, "_copy"):
            self._tier.held_bytes -= self.moved_bytes


class HostTier(Tier):
    """Plain copies."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes

    def put(self, tensor: Tensor, moved_bytes: int | None = None) -> Slot:
        """Copy the storage."""
        return HostSlot(self, tensor, moved_bytes)


def open_tier(folder: str | os.PathLike[str] | None, limit_bytes: int | None) -> Tier:
    """Pinned memory and copy streams where there is a CUDA device, plain copies elsewhere."""
    if torch.cuda.is_available():
        from memopt.offload.pinned.tier import PinnedTier

        return PinnedTier(limit_bytes)
    return HostTier(limit_bytes)
