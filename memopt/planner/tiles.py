"""What it is to run in tiles: the trace of a tiled step and its runtime run these lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def run_in_tiles(forward: Callable[..., Tensor], chunks: int, dim: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` of ``x`` cut into ``chunks`` along ``dim``, piece by piece, joined along the same dimension."""
    return torch.cat([forward(piece, *args, **kwargs) for piece in x.chunk(chunks, dim)], dim)
