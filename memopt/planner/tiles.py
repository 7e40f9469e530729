"""What it is to run in tiles: the trace of a tiled step and its runtime run these lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def run_in_tiles(forward: Callable[..., Tensor], chunks: int, dim: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` of ``x`` cut into ``chunks`` along ``dim``, piece by piece, joined along the same dimension.

    Pieces are contiguous, as modules expect that ``view`` their input: copies, unless ``dim`` is the first of a size
    above 1.
    """
    return torch.cat([forward(piece.contiguous(), *args, **kwargs) for piece in x.chunk(chunks, dim)], dim)
