"""The vocabulary loss with all its logits: the readable oracle that every other implementation is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels.losses.settings import LossStats


def dense_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    z_loss: float = 0.0,
    shift: int = 0,
    return_stats: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, LossStats]:
    """What :func:`memopt.linear_cross_entropy` computes, by autograd through the whole matrix of logits.

    The product is taken in the dtype of ``hidden``, everything after it in float32, or in float64 for float64 input;
    without ``upcast`` everything in the dtype of ``hidden``, as a training loop without further care has it.
    Cost: several tensors of N x V elements, alive until backward.
    """
    soft = target.is_floating_point()
    if shift:
        hidden = hidden[..., :-shift, :]
        target = target[..., shift:, :] if soft else target[..., shift:]
    logits = hidden @ weight.t()
    logits = logits.float() if upcast and logits.dtype != torch.float64 else logits
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if logit_scale is not None:
        logits = logits * (logit_scale.to(logits.dtype) if isinstance(logit_scale, Tensor) else logit_scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    V = weight.shape[0]
    log_p = logits.log_softmax(-1)
    lse = logits.logsumexp(-1)
    weights = torch.ones(V, dtype=log_p.dtype, device=log_p.device) if class_weight is None else class_weight.to(log_p)
    if soft:
        counted = torch.ones(target.shape[:-1], dtype=torch.bool, device=target.device)
        probabilities = (1 - label_smoothing) * target.to(log_p.dtype) + label_smoothing / V
        loss = -(weights * probabilities * log_p).sum(-1)
        share = counted.to(log_p.dtype)
        correct = logits.argmax(-1) == target.argmax(-1)
    else:
        counted = target != ignore_index
        entry = torch.where(counted, target, 0)
        share = torch.where(counted, weights[entry], 0)
        found = torch.where(counted, log_p.gather(-1, entry.unsqueeze(-1)).squeeze(-1), 0.0)
        loss = -(1 - label_smoothing) * share * found
        if label_smoothing:
            loss = loss - label_smoothing / V * (weights * log_p).sum(-1) * counted
        correct = (logits.argmax(-1) == target) & counted
    lse = torch.where(counted, lse, 0.0)
    penalty = z_loss * lse.square()
    if reduction == "none":
        total = loss + penalty
    elif reduction == "sum":
        total = (loss + penalty).sum()
    else:
        total = loss.sum() / share.sum() + (penalty.sum() / counted.sum() if z_loss else 0.0)
    if not return_stats:
        return total
    with torch.no_grad():
        p = log_p.exp()
        entropy = -(torch.where(p > 0, p * log_p, 0.0)).sum(-1) * counted
        accuracy = correct.sum().to(log_p.dtype) / counted.sum()
    return total, LossStats(lse, entropy.detach(), accuracy)
