"""What the layers share: pieces of rows, the dtype of arithmetic, checks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_BYTES = 4 * 2**20


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows whose float32 copy takes about ``PIECE_BYTES``: working memory does not grow with the input."""
    step = max(1, PIECE_BYTES // (4 * max(1, width)))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def opmath(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64: the dtype of a layer's arithmetic."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def refuse_recorded_backward(what: str) -> None:
    """RuntimeError where second derivatives are asked for; a single torch.func.grad, which always records, may pass."""
    if torch.compiler.is_compiling():  # a compiled backward is never recorded
        return
    nested = torch._C._functorch.get_interpreter_stack()
    if (nested is None and torch.is_grad_enabled()) or (nested is not None and len(nested) > 1):
        raise RuntimeError(f"{what} has first derivatives only; use torch's own layer for higher ones")


def check_float(name: str, tensor: Tensor) -> None:
    """TypeError or ValueError unless a floating tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
