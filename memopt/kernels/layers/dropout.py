"""Dropout that keeps a seed instead of a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.pieces import check_float, refuse_recorded_backward


def seeded_dropout(x: Tensor, p: float = 0.5, training: bool = True, seed: int | None = None) -> Tensor:
    """x / (1 - p) where a draw keeps it, else zero; backward draws the same mask again from the same seed.

    Args:
        x: any shape, floating.
        p: probability of zero, 0 to 1.
        training: False returns ``x``.
        seed: of this call; None takes one from torch's generator of the CPU, so that ``torch.manual_seed`` fixes it.

    Returns:
        The same shape and dtype. A device draws the same mask for the same seed and shape; devices differ.

    Raises:
        ValueError, TypeError: ``x`` is not a floating tensor, or ``p`` is not a probability.

    Cost: nothing is kept but the seed, where torch keeps a byte per element; the draw is made twice. The mask exists
    for a moment, a byte per element.
    """
    check_float("x", x)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    if not training or p == 0.0:
        return x
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    y: Tensor = _SeededDropout.apply(x, p, seed)  # type: ignore[no-untyped-call]
    return y


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    if p == 1.0:
        return torch.zeros_like(x)
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p, generator=generator)
    return torch.where(kept, x / (1.0 - p), 0)


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, p: float, seed: int) -> Tensor:
        return _dropped(x, p, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.p, ctx.seed = inputs

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None, None]:
        refuse_recorded_backward("seeded_dropout")
        return _dropped(of_y, ctx.p, ctx.seed), None, None
