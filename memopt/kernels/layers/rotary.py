"""Rotary position embedding in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.pieces import check_float, refuse_recorded_backward


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates pairs of the last dimension of ``x`` in place: (a, b) to (a cos - b sin, b cos + a sin).

    A pair is elements i and i + D / 2, or 2 i and 2 i + 1 if ``interleaved``. Backward turns the gradient back by the
    same angles, and keeps nothing of ``x``.

    Args:
        x: (..., D), D even; not a leaf that requires a gradient, as in every operation in place.
        cos, sin: of the angles, (..., D / 2), broadcast against ``x``; usually (T, D / 2). They get no gradient.

    Returns:
        ``x``.

    Raises:
        ValueError, TypeError: shapes that do not fit.

    Cost: keeps ``cos`` and ``sin`` alone; two products' worth of working memory of half of ``x``.
    """
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension, got shape {tuple(x.shape)}")
    half = (*x.shape[:-1], x.shape[-1] // 2)
    for name, angle in (("cos", cos), ("sin", sin)):
        check_float(name, angle)
        fits = angle.dim() <= len(half) and all(
            a in (1, b) for a, b in zip(angle.shape[::-1], half[::-1], strict=False)
        )
        if not fits:
            raise ValueError(f"{name} must broadcast to {half}, half of x's last dimension, got {tuple(angle.shape)}")
        if angle.requires_grad:
            raise ValueError(f"{name} gets no gradient here; pass {name}.detach()")
    rotated: Tensor = _Rotary.apply(x, cos, sin, interleaved)  # type: ignore[no-untyped-call]
    return rotated


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> None:
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second, cosine = a.to(wide), b.to(wide), cos.to(wide)
    sine = -sin.to(wide) if back else sin.to(wide)
    turned = first * cosine - second * sine
    b.copy_(second * cosine + first * sine)
    a.copy_(turned)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        _rotate_(x, cos, sin, interleaved, back=False)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return x

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_recorded_backward("rotary_")
        of_x = of_y.clone()
        cos, sin = ctx.saved_tensors
        _rotate_(of_x, cos, sin, ctx.interleaved, back=True)
        return of_x, None, None, None
