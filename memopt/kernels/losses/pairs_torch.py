"""Column statistics and the two-sided softmax gradient of a chunk of similarities, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def column_statistics_(highest: Tensor, total: Tensor, similarities: Tensor, scale: Tensor) -> None:
    """Merges a chunk into the running maxima and sums of exp(z - maximum) of its columns."""
    z = similarities.to(scale.dtype) * scale
    top = torch.maximum(highest, z.amax(0))
    total.mul_((highest - top).exp_()).add_((z - top).exp_().sum(0))
    highest.copy_(top)


def pair_gradient_(
    similarities: Tensor, rows: Tensor, columns: Tensor, target: Tensor, coefficient: Tensor, scale: Tensor
) -> Tensor:
    """Writes the gradient over ``similarities``; returns, per row, that with respect to ``scale``."""
    C = similarities.shape[1]
    raw = similarities.to(scale.dtype)
    z = raw * scale
    d = rows[1].unsqueeze(1) * (z - rows[0].unsqueeze(1)).exp_() + columns[1] * (z - columns[0]).exp_()
    inside = ((target >= 0) & (target < C)).to(d.dtype).unsqueeze(1)
    d.scatter_add_(1, target.clamp(0, C - 1).unsqueeze(1), -2.0 * coefficient * inside)
    of_scale = (d * raw).sum(1)
    similarities.copy_(d * scale)
    return of_scale
