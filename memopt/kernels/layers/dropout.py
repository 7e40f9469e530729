"""Dropout that keeps a seed instead of a mask."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.choosing import implementation
from memopt.kernels.layers.pieces import check_float


def seeded_dropout(x: Tensor, p: float = 0.5, training: bool = True, seed: int | None = None) -> Tensor:
    """x / (1 - p) where a draw keeps it, else zero; backward draws the same mask again from the same seed.

    An element's draw is a function of the seed and of its place in the flattened tensor (``memopt.kernels.hashing``),
    the same on every device. The probability is exact to ``2**-33``.

    Args:
        x: any shape, floating.
        p: probability of zero, 0 to 1.
        training: False returns ``x``.
        seed: of this call; None takes one from torch's generator of the CPU, so that ``torch.manual_seed`` fixes it.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError, TypeError: ``x`` is not a floating tensor, or ``p`` is not a probability.

    Cost: 8 bytes are kept, where torch keeps a byte per element; the draw is made twice.
    """
    check_float("x", x)
    if not isinstance(p, Real):
        raise TypeError(f"p must be a number, got {p!r} of type {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    if not training or p == 0.0:
        return x
    drawn = torch.randint(2**62, (), device="cpu") if seed is None else torch.tensor(seed, device="cpu")
    y: Tensor = _Dropout.apply(x, p, drawn)
    return y


@torch.library.custom_op("memopt::dropout", mutates_args=())
def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """See :func:`seeded_dropout`; ``seed`` is an int64 scalar on the CPU."""
    if p == 1.0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    y: Tensor = implementation(x, "masks").dropout(x.contiguous(), p, int(seed))
    return y


@dropout.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, p: float, seed: Tensor) -> Tensor:
        y: Tensor = dropout(x, p, seed)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.p, seed = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(of_y, ctx.p, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]
