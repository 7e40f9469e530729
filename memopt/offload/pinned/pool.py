"""Pinned host memory: buffers of powers of two, handed out, taken back and used again.

Making one is slower than many copies. torch pins powers of two only, whatever it is asked for, so that a storage lies
in up to four buffers, of falling powers of two, that together are at most an eighth longer; so what is counted here is
what is pinned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.offload.errors import SwapError


class PinnedPool:
    """Pinned host buffers by length, handed out and taken back.

    Args:
        limit_bytes: the most that may be pinned; None for no limit but the system's.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.pinned_bytes = 0
        self._free: dict[int, list[Tensor]] = {}

    @staticmethod
    def lengths(size: int) -> list[int]:
        """Powers of two, at least 64 KiB each, that hold so many bytes together."""
        step = max(1 << (size.bit_length() - 4) if size >= 8 else 1, 2**16)
        total = -(-max(size, 1) // step) * step
        return [1 << bit for bit in reversed(range(total.bit_length())) if total >> bit & 1]

    def take(self, size: int) -> list[Tensor]:
        """Buffers of at least ``size`` bytes together.

        Raises:
            SwapError: the limit is reached, or the system pins no more.
        """
        found: list[Tensor] = []
        try:
            for length in self.lengths(size):
                found.append(self._one(length))
        except SwapError:
            for buffer in found:
                self.give(buffer)
            raise
        return found

    def _one(self, length: int) -> Tensor:
        if self._free.get(length):
            return self._free[length].pop()
        if self.limit_bytes is not None and self.pinned_bytes + length > self.limit_bytes:
            self._release_unused()
        if self.limit_bytes is not None and self.pinned_bytes + length > self.limit_bytes:
            raise SwapError(
                f"swap tier host: {self.pinned_bytes} bytes are pinned and {length} more would exceed the limit of "
                f"{self.limit_bytes} bytes; raise swap_limit_bytes, or plan with less host memory or the disk tier"
            )
        try:
            buffer = torch.empty(length, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise SwapError(
                f"swap tier host: the system did not pin {length} bytes of host memory ({self.pinned_bytes} "
                "are pinned): this is host memory, not the GPU's; raise the limit of locked memory (ulimit -l, or the "
                "memory of the virtual machine), set swap_limit_bytes, or use the disk tier"
            ) from error
        self.pinned_bytes += length
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._free.setdefault(buffer.numel(), []).append(buffer)

    def _release_unused(self) -> None:
        for buffers in self._free.values():
            self.pinned_bytes -= sum(buffer.numel() for buffer in buffers)
        self._free.clear()
        if hasattr(torch._C, "_host_emptyCache"):  # torch keeps pinned memory otherwise
            torch._C._host_emptyCache()
