"""Softmax statistics and softmax gradient of a chunk of logits in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_BYTES = 8 * 2**20  # of working memory per tensor; several are alive at a time


def logit_statistics(
    logits: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    soft: Tensor | None,
    scale: Tensor,
    softcap: float,
    want_weighted: bool,
    want_expected: bool,
) -> tuple[Tensor, Tensor]:
    """The five statistics that ``logits_ops`` names, and the argmax."""
    R, V = logits.shape
    out = torch.zeros(5, R, dtype=scale.dtype, device=logits.device)
    argmax = torch.zeros(R, dtype=torch.int64, device=logits.device)
    for rows in _blocks(R, V, scale):
        _, z = _final_logits(logits[rows], bias, scale, softcap)
        out[0, rows], argmax[rows] = z.max(1)
        below = z - out[0, rows].unsqueeze(1)
        e = below.exp()
        out[1, rows] = e.sum(1)
        if want_expected:
            out[2, rows] = torch.where(e == 0, 0.0, e * below).sum(1)
        if target is not None:
            inside = (target[rows] >= 0) & (target[rows] < V)
            found = z.gather(1, target[rows].clamp(0, V - 1).unsqueeze(1)).squeeze(1)
            out[3, rows] = torch.where(inside, found, 0.0)
        if want_weighted:
            if class_weight is not None:
                z = z * class_weight
            out[4, rows] = (z if soft is None else z * soft[rows]).sum(1)
    return out, argmax


def softmax_gradient_(
    logits: Tensor,
    coefficients: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    soft: Tensor | None,
    scale: Tensor,
    softcap: float,
    want_scale: bool,
) -> Tensor:
    """Replaces ``logits`` by the gradient with respect to them; returns, per row, that with respect to ``scale``."""
    R, V = logits.shape
    scale_gradient = torch.zeros(R, dtype=scale.dtype, device=logits.device)
    for rows in _blocks(R, V, scale):
        raw, z = _final_logits(logits[rows], bias, scale, softcap)
        lse, of_softmax, of_target, of_uniform = coefficients[:, rows].unsqueeze(2)
        d = of_softmax * (z - lse).exp_()
        weights = 1.0 if class_weight is None else class_weight
        d -= of_uniform * weights
        if soft is not None:
            d -= of_target * weights * soft[rows]
        elif target is not None:
            inside = (target[rows] >= 0) & (target[rows] < V)
            taken = torch.where(inside.unsqueeze(1), -of_target, torch.zeros_like(of_target))
            d.scatter_add_(1, target[rows].clamp(0, V - 1).unsqueeze(1), taken)
        if softcap:
            d *= 1.0 - (z / softcap).square_()
        if want_scale:
            scale_gradient[rows] = (d * raw).sum(1)
        logits[rows] = (d * scale).to(logits.dtype)
    return scale_gradient


def _final_logits(logits: Tensor, bias: Tensor | None, scale: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    raw = logits.to(scale.dtype)
    if bias is not None:
        raw = raw + bias
    z = raw * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return raw, z


def _blocks(R: int, V: int, scale: Tensor) -> list[slice]:
    step = max(1, _BLOCK_BYTES // max(1, V * scale.element_size()))
    return [slice(first, min(first + step, R)) for first in range(0, R, step)]
