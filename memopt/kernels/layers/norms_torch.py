"""The oracle of the norms: plain torch on float32 pieces of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memopt.kernels.layers.pieces import opmath, pieces


class Kept(NamedTuple):
    """What backward has: ``rows`` of y if ``is_output``, else of x, (..., D); mean and 1 / deviation of each row."""

    rows: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    inverse: Tensor
    is_output: bool
    centred: bool


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and 1 / deviation of contiguous rows (..., D)."""
    y = torch.empty_like(x)
    kind, x, flat_y = opmath(x), x.view(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    R = x.shape[0]
    mean = torch.empty(R if centred else 0, dtype=kind, device=x.device)
    inverse = torch.empty(R, dtype=kind, device=x.device)
    for rows in pieces(*x.shape):
        wide = x[rows].to(kind)
        if centred:
            mean[rows] = wide.mean(1)
            wide = wide - mean[rows, None]
        inverse[rows] = (wide.square().mean(1) + eps).rsqrt()
        wide = wide * inverse[rows, None]
        if weight is not None:
            wide *= weight
        if bias is not None:
            wide += bias
        flat_y[rows] = wide
    return y, mean, inverse


def norm_backward(of_y: Tensor, k: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    weight, bias, inverse = k.weight, k.bias, k.inverse
    kind, D = inverse.dtype, k.rows.shape[-1]
    of_x = torch.empty_like(k.rows)
    flat_of_x, kept, of_y = of_x.view(-1, D), k.rows.view(-1, D), of_y.view(-1, D)
    of_weight = torch.zeros(D, dtype=kind, device=kept.device)
    of_bias = torch.zeros_like(of_weight)
    for rows in pieces(*kept.shape):
        wide, g = kept[rows].to(kind), of_y[rows].to(kind)
        if k.is_output:
            wide = wide if bias is None else wide - bias
            unit = wide if weight is None else wide / weight
        else:
            unit = (wide - k.mean[rows, None] if k.centred else wide) * inverse[rows, None]
        of_weight += (g * unit).sum(0)
        of_bias += g.sum(0)
        if weight is not None:
            g = g * weight
        along = (g * unit).mean(1, keepdim=True)
        if k.centred:
            g = g - g.mean(1, keepdim=True)
        flat_of_x[rows] = (g - unit * along) * inverse[rows, None]
    return of_x, of_weight, of_bias
