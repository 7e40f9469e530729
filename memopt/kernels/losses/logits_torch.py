"""Softmax statistics and softmax gradient of a chunk of logits in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels.losses.logits import Logits

_BLOCK_BYTES = 8 * 2**20  # of working memory per tensor; several are alive at a time


def logit_statistics(x: Logits, want_weighted: bool, want_expected: bool) -> tuple[Tensor, Tensor]:
    """The five statistics that ``logits_ops`` names, and the argmax."""
    R, V = x.raw.shape
    out = torch.zeros(5, R, dtype=x.scale.dtype, device=x.raw.device)
    argmax = torch.zeros(R, dtype=torch.int64, device=x.raw.device)
    for rows in _blocks(R, V, x.scale):
        _, z = _final_logits(x, rows)
        out[0, rows], argmax[rows] = z.max(1)
        below = z - out[0, rows].unsqueeze(1)
        e = below.exp()
        out[1, rows] = e.sum(1)
        if want_expected:
            out[2, rows] = torch.where(e == 0, 0.0, e * below).sum(1)
        if x.target is not None:
            inside = (x.target[rows] >= 0) & (x.target[rows] < V)
            found = z.gather(1, x.target[rows].clamp(0, V - 1).unsqueeze(1)).squeeze(1)
            out[3, rows] = torch.where(inside, found, 0.0)
        if want_weighted:
            if x.class_weight is not None:
                z = z * x.class_weight
            out[4, rows] = (z if x.soft is None else z * x.soft[rows]).sum(1)
    return out, argmax


def softmax_gradient_(x: Logits, coefficients: Tensor, want_scale: bool) -> Tensor:
    """Replaces ``x.raw`` by the gradient with respect to them; returns, per row, that with respect to ``scale``."""
    R, V = x.raw.shape
    scale_gradient = torch.zeros(R, dtype=x.scale.dtype, device=x.raw.device)
    for rows in _blocks(R, V, x.scale):
        raw, z = _final_logits(x, rows)
        lse, of_softmax, of_target, of_uniform = coefficients[:, rows].unsqueeze(2)
        d = of_softmax * (z - lse).exp_()
        weights = 1.0 if x.class_weight is None else x.class_weight
        d -= of_uniform * weights
        if x.soft is not None:
            d -= of_target * weights * x.soft[rows]
        elif x.target is not None:
            inside = (x.target[rows] >= 0) & (x.target[rows] < V)
            taken = torch.where(inside.unsqueeze(1), -of_target, torch.zeros_like(of_target))
            d.scatter_add_(1, x.target[rows].clamp(0, V - 1).unsqueeze(1), taken)
        if x.softcap:
            d *= 1.0 - (z / x.softcap).square_()
        if want_scale:
            scale_gradient[rows] = (d * raw).sum(1)
        x.raw[rows] = (d * x.scale).to(x.raw.dtype)
    return scale_gradient


def _final_logits(x: Logits, rows: slice) -> tuple[Tensor, Tensor]:
    raw = x.raw[rows].to(x.scale.dtype)
    if x.bias is not None:
        raw = raw + x.bias
    z = raw * x.scale
    if x.softcap:
        z = x.softcap * torch.tanh(z / x.softcap)
    return raw, z


def _blocks(R: int, V: int, scale: Tensor) -> list[slice]:
    step = max(1, _BLOCK_BYTES // max(1, V * scale.element_size()))
    return [slice(first, min(first + step, R)) for first in range(0, R, step)]
