"""The forward and the backward of the vocabulary loss, without autograd: which pass runs when."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memopt.kernels.losses.coefficients import Upstream
from memopt.kernels.losses.problem import Problem
from memopt.kernels.losses.row_pass import Gradients, RowResult, Wanted, row_pass
from memopt.kernels.losses.slice_pass import slice_pass
from memopt.kernels.losses.tile_pass import tile_gradients, tile_statistics


class Outcome(NamedTuple):
    """What the forward gives: the loss, per-position statistics, and gradients for an upstream gradient of one.

    ``lse`` is (2, P): the log-sum-exp, and what its rounding left out.
    """

    loss: Tensor
    lse: Tensor
    entropy: Tensor
    accuracy: Tensor
    gradients: Gradients | None


def forward(problem: Problem, wanted: Wanted) -> Outcome:
    """Loss and statistics; for a mean or a sum also the gradients, all but the weight's in recompute mode."""
    p, settings = problem, problem.settings
    early = settings.early and wanted.any()
    upstream, factor = _unit_upstream(p) if early else (None, None)
    if settings.mode == "recompute":
        wanted = Wanted(wanted.hidden, False, wanted.bias, wanted.scale)
    result = tile_statistics(p) if settings.mode == "tiles" else row_pass(p, wanted, upstream)
    result.gradients.factor = factor
    loss = _reduce(p, result)
    accuracy = _accuracy(p, result) if settings.want_stats else loss.new_zeros(())
    return Outcome(
        loss=loss,
        lse=torch.stack([p.spread(part) for part in result.lse]),
        entropy=p.spread(result.entropy),
        accuracy=accuracy,
        gradients=result.gradients if early else None,
    )


def backward(problem: Problem, wanted: Wanted, lse: Tensor, of_loss: Tensor | None, of_lse: Tensor | None) -> Gradients:
    """All wanted gradients from the logits made again, for gradients of the loss and of the log-sum-exp as returned."""
    p = problem
    upstream = _upstream(p, of_loss, of_lse)
    if p.settings.mode == "tiles":
        return tile_gradients(p, wanted, torch.stack([p.collect(part) for part in lse]), upstream)
    sliced = wanted.weight and p.settings.mode == "recompute"
    rest = Wanted(wanted.hidden, wanted.weight and not sliced, wanted.bias, wanted.scale)
    gradients = row_pass(p, rest, upstream).gradients if rest.any() else Gradients()
    if sliced:
        gradients.weight = slice_pass(p, torch.stack([p.collect(part) for part in lse]), upstream)
    return gradients


def _unit_upstream(p: Problem) -> tuple[Upstream, Tensor | None]:
    """Row coefficients for an upstream gradient of one.

    float16 would lose a mean's small values, so that a power of two, which rounds nothing, is divided by later.
    """
    settings = p.settings
    one = torch.ones((), dtype=p.opmath, device=p.hidden.device)
    if settings.reduction == "sum":
        return Upstream(one, one * settings.z_loss if settings.z_loss else None), None
    inverse, count = _inverse(p.denominator()), max(p.rows, 1)
    if p.hidden.dtype != torch.float16:
        return Upstream(inverse, one * (settings.z_loss / count) if settings.z_loss else None), None
    power = torch.exp2(p.denominator().clamp_min(1e-30).log2().ceil())
    return Upstream(inverse * power, power * (settings.z_loss / count) if settings.z_loss else None), 1.0 / power


def _upstream(p: Problem, of_loss: Tensor | None, of_lse: Tensor | None) -> Upstream:
    settings = p.settings
    by_row = square = None
    if of_loss is not None and settings.reduction == "none":
        by_row = p.collect(of_loss)
        square = by_row * settings.z_loss if settings.z_loss else None
    elif of_loss is not None:
        of_loss = of_loss.to(p.opmath)
        mean = settings.reduction == "mean"
        by_row = of_loss * _inverse(p.denominator()) if mean else of_loss
        if settings.z_loss:
            square = of_loss * (settings.z_loss / (max(p.rows, 1) if mean else 1))
    return Upstream(by_row, square, None if of_lse is None else p.collect(of_lse[0]))


def _inverse(denominator: Tensor) -> Tensor:
    """One over it, and zero where nothing counts, so that gradients stay finite."""
    return torch.where(denominator > 0, 1.0 / denominator, torch.zeros_like(denominator))


def _reduce(p: Problem, result: RowResult) -> Tensor:
    settings = p.settings
    penalty = settings.z_loss * result.lse[0].square() if settings.z_loss else None
    if settings.reduction == "none":
        return p.spread(result.loss if penalty is None else result.loss + penalty)
    loss = result.loss.sum()
    if settings.reduction == "sum":
        return loss if penalty is None else loss + penalty.sum()
    loss = loss / p.denominator()
    return loss if penalty is None else loss + penalty.sum() / p.rows if p.rows else loss


def _accuracy(p: Problem, result: RowResult) -> Tensor:
    if p.target is not None:
        correct = result.argmax == p.target + p.shard.first
    else:
        assert p.soft is not None
        best = p.soft.argmax(1)
        correct = result.argmax == (best if p.positions is None else best.index_select(0, p.positions))
    return correct.sum().to(p.opmath) / p.rows if p.rows else result.loss.new_full((), float("nan"))
