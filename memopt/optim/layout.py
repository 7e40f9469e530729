"""How a parameter's elements are laid out for low-bit states, decided by its global shape alone.

The kernels take the slices of the first dimension as rows (a convolution weight ``[out, in, h, w]`` has rows of
``in * h * w`` elements) and never let a block cross a row, so that cutting a parameter between rows, as FSDP2 does,
changes no code and no scale. Rows shorter than a block would each pay for a scale of their own: such parameters are
handed over as one flat row, and scales cost at most ``4 / block`` bytes an element whatever the shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

MIN_LOW_BIT_SIZE = 4096
"""Parameters with fewer elements (of the global, unsharded shape) keep fp32 states: they hold next to nothing."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Extent:
    """What decides how a parameter's states are kept: its whole shape, and the shape of the part held here.

    The two differ only for a parameter sharded along its first dimension. Precision, rows and blocks follow ``shape``
    alone, so they are the same on every mesh.
    """

    shape: Shape
    local: Shape

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


def is_flat(extent: Extent, block: int) -> bool:
    """Whether the parameter is one flat row under a format with ``block`` elements per scale (0: a plain format)."""
    return len(extent.shape) < 2 or math.prod(extent.shape[1:]) < block


def as_rows(tensor: Tensor, extent: Extent, block: int) -> Tensor:
    """``tensor`` (of the local shape) as the kernels take it: flat where rows are short, else as it is.

    A copy only where the tensor is flat and not contiguous.
    """
    return tensor.reshape(-1) if tensor.dim() > 1 and is_flat(extent, block) else tensor


def row_shape(extent: Extent, block: int) -> Shape:
    """The shape of ``as_rows`` of the part held here."""
    if len(extent.shape) > 1 and is_flat(extent, block):
        return (math.prod(extent.local),)
    return extent.local
