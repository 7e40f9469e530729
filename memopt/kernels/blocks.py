"""How a tensor splits into rows and blocks, the same for every back end.

A row is one slice of the first dimension (a 1-D tensor is one row), so that sharding by rows moves whole rows. A row
splits into blocks of ``block`` elements. What is left over at its end

- is a smaller block of its own in a 1-D tensor (the layout of bitsandbytes for flat tensors);
- otherwise joins the last full block (which then has fewer than ``2 * block`` elements), so that scales never cost
  more than ``4 / block`` bytes per element; a row shorter than ``block`` is one block and costs ``4 / length``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The blocks of one tensor: ``rows`` times ``row_length`` elements, ``per_row`` blocks of ``block`` in each row."""

    rows: int
    row_length: int
    block: int
    per_row: int
    flat: bool

    @property
    def last(self) -> int:
        """Length of the last block of a row."""
        return self.row_length - (self.per_row - 1) * self.block if self.per_row else 0

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales: (blocks,) of a 1-D tensor, else (rows, blocks)."""
        return (self.per_row,) if self.flat else (self.rows, self.per_row)

    def code_shape(self, shape: Sequence[int], bits: int) -> tuple[int, ...]:
        """Shape of the uint8 codes: the tensor's own for 8 bits, (rows, bytes) or (bytes,) for 4 bits."""
        if bits == 8:
            return tuple(shape)
        return (self.row_bytes,) if self.flat else (self.rows, self.row_bytes)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of 4-bit codes: each block rounded up to whole bytes."""
        return max(self.per_row - 1, 0) * ((self.block + 1) // 2) + (self.last + 1) // 2

    def index(self, device: torch.device | None = None) -> Tensor:
        """The block number of each element of a row, int64 (row_length,)."""
        return (torch.arange(self.row_length, device=device) // self.block).clamp_(max=max(self.per_row - 1, 0))


def blocks_of(shape: Sequence[int], block: int) -> Blocks:
    """The blocks of a tensor of this shape."""
    flat = len(shape) < 2
    if flat:
        length = shape[0] if shape else 1
        return Blocks(1, length, block, -(-length // block), True)
    length = 1
    for size in shape[1:]:
        length *= size
    return Blocks(shape[0], length, block, max(1, length // block) if length else 0, False)


def block_maxima(magnitudes: Tensor, blocks: Blocks) -> Tensor:
    """Largest of each block: (rows, row_length) to (rows, per_row); NaN where a block holds one."""
    rows, whole = magnitudes.shape[0], max(blocks.per_row - 1, 0) * blocks.block
    if blocks.per_row == 0 or rows == 0:
        return magnitudes.new_zeros((rows, blocks.per_row))
    head = magnitudes[:, :whole].reshape(rows, blocks.per_row - 1, blocks.block).amax(-1)
    return torch.cat([head, magnitudes[:, whole:].amax(-1, keepdim=True)], -1)
