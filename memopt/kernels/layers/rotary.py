"""Rotary position embedding in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.choosing import implementation
from memopt.kernels.layers.pieces import check_float, refuse_recorded_backward


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates pairs of the last dimension of ``x`` in place: (a, b) to (a cos - b sin, b cos + a sin).

    A pair is elements i and i + D / 2, or 2 i and 2 i + 1 if ``interleaved``. Backward turns the gradient back by the
    same angles, and keeps nothing of ``x``.

    Args:
        x: (..., D), D even; not a leaf that requires a gradient, as in every operation in place.
        cos: of the angles, (..., D / 2), broadcast against ``x``; usually (T, D / 2). It gets no gradient.
        sin: the same.

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


@torch.library.custom_op("memopt::rotate_", mutates_args=("x",))
def rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> None:
    """Turns the pairs of ``x`` in place by the angles, or by their opposites if ``back``."""
    implementation(x, "rotary").rotate_(x, cos, sin, interleaved, back)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        rotate_(x, cos, sin, interleaved, False)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return x

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_recorded_backward("rotary_")
        of_x = of_y.clone()
        with torch.no_grad():  # torch.func.grad records, and registered operations cannot
            rotate_(of_x, *ctx.saved_tensors, ctx.interleaved, True)
        return of_x, None, None, None
