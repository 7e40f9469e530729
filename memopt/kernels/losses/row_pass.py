"""Row chunks: the logits of a few rows at a time, reduced and, where gradients are wanted, turned into gradients.

A chunk is one product ``hidden @ weight.T`` into scratch that is used again for every chunk; the softmax gradient
overwrites it, and two more products make the chunk's part of both gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.kernels.losses.logits_ops import logit_statistics, softmax_gradient_
from memopt.kernels.losses.problem import Problem, values_unknown
from memopt.kernels.losses.settings import rows_per_chunk
from memopt.kernels.losses.weight_gradient import WeightGradient


@dataclass(frozen=True)
class Wanted:
    """Which gradients to make."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    scale: bool = False

    def __iter__(self) -> Iterator[bool]:
        return iter((self.hidden, self.weight, self.bias, self.scale))

    def any(self) -> bool:
        return any(self)


@dataclass
class Gradients:
    """Gradients in the dtypes of their tensors (bias and scale in ``opmath``), None where not wanted.

    All are still to be multiplied by ``factor``, which exists only for a mean in float16.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    factor: Tensor | None = None

    def scale_(self, by: Tensor) -> None:
        """Multiplies all in place, so that no second gradient of the weight's size is ever alive."""
        by = by if self.factor is None else by * self.factor
        if by.device.type == "cpu" and not values_unknown(by) and bool(by == 1):
            return  # the usual case; elsewhere looking would make the device wait
        for gradient in (self.hidden, self.weight, self.bias, self.scale):
            if gradient is not None:
                gradient.mul_(by)

    def cast(self, *kinds: tuple[torch.dtype, torch.Size] | None) -> tuple[Tensor | None, ...]:
        """The four, with bias and scale in the dtype and shape of their tensors."""
        pairs = zip((self.bias, self.scale), kinds, strict=True)
        last = (None if t is None or kind is None else t.to(kind[0]).view(kind[1]) for t, kind in pairs)
        return (self.hidden, self.weight, *last)


@dataclass(frozen=True)
class Upstream:
    """Gradient of the final result with respect to each row's parts, scalars or (M,), None for zero."""

    loss: Tensor | None = None  # of the cross-entropy
    square: Tensor | None = None  # of the squared log-sum-exp (z-loss)
    lse: Tensor | None = None  # of the log-sum-exp as returned

    def rows(self, first: int, stop: int) -> Upstream:
        return Upstream(
            *(
                part if part is None or part.dim() == 0 else part[first:stop]
                for part in (self.loss, self.square, self.lse)
            )
        )


@dataclass
class RowResult:
    """Per counted row: log-sum-exp, cross-entropy, entropy (zero unless wanted), argmax; and the gradients.

    ``lse`` is (2, M): the log-sum-exp and what its rounding left out, without which probabilities of large logits
    would be wrong by as much as the log-sum-exp's last place.
    """

    lse: Tensor
    loss: Tensor
    entropy: Tensor
    argmax: Tensor
    gradients: Gradients


def row_pass(problem: Problem, wanted: Wanted, upstream: Upstream | None) -> RowResult:
    """Statistics of every row and, given ``upstream``, the wanted gradients.

    Scratch: one chunk of logits, at most ``settings.chunk_bytes`` (a single row where that is more), and for rows that
    are not consecutive one chunk of ``hidden`` and of its gradient.
    """
    p, M, settings = problem, problem.rows, problem.settings
    V, H = p.weight.shape
    device, opmath = p.hidden.device, p.opmath
    lse = torch.empty(2, M, dtype=opmath, device=device)
    loss, entropy = torch.empty(2, M, dtype=opmath, device=device)
    argmax = torch.empty(M, dtype=torch.int64, device=device)
    result = RowResult(lse, loss, entropy, argmax, Gradients())
    made = result.gradients
    sink = WeightGradient(p.weight, settings) if wanted.weight and upstream is not None else None
    if upstream is not None:
        if wanted.hidden:
            made.hidden = torch.empty_like(p.hidden) if p.index is None else torch.zeros_like(p.hidden)
        made.bias = torch.zeros(V, dtype=opmath, device=device) if wanted.bias else None
        made.scale = torch.zeros((), dtype=opmath, device=device) if wanted.scale else None
    bytes_per_row = (V + (0 if p.index is None else 2 * H)) * p.hidden.element_size()
    bytes_per_row += V * p.scale.element_size() if p.soft is not None else 0
    R = rows_per_chunk(M, bytes_per_row, settings.chunk_bytes)
    scratch = torch.empty(min(R, M), V, dtype=p.hidden.dtype, device=device)
    weight_t = p.weight.t()
    for first in range(0, M, R):
        stop = min(first + R, M)
        rows = slice(first, stop)
        h, target, soft = p.hidden_rows(first, stop), p.target_rows(first, stop), p.soft_rows(first, stop)
        logits = torch.mm(h, weight_t, out=scratch[: stop - first])
        constant = (target, p.bias, p.class_weight, soft, p.scale, settings.softcap)
        weighted = soft is not None or settings.label_smoothing > 0
        statistics, argmax = logit_statistics(logits, *constant, weighted, settings.want_stats)
        statistics, result.argmax[rows] = p.shard.merge(statistics, argmax)
        of_lse = lse_coefficient(p, first, stop, soft)
        reduce_rows(p, statistics, of_lse, rows, result)
        if upstream is None:
            continue
        coefficients = row_coefficients(p, upstream.rows(first, stop), result.lse[:, rows], of_lse, first, stop)
        by_scale = softmax_gradient_(logits, coefficients, *constant, wanted.scale)
        if made.scale is not None:
            made.scale += by_scale.sum()
        if made.bias is not None:
            made.bias += logits.sum(0, dtype=opmath)
        if made.hidden is not None:
            if p.index is None:
                torch.mm(logits, p.weight, out=made.hidden[rows])
            else:
                made.hidden.index_copy_(0, p.index[rows], logits @ p.weight)
        if sink is not None:
            sink.add(logits, h)
    made.weight = None if sink is None else sink.finish()
    for shared in (made.hidden, made.scale):
        if shared is not None:
            p.shard.sum_(shared)
    return result


def lse_coefficient(p: Problem, first: int, stop: int, soft: Tensor | None) -> Tensor | float:
    """How often the log-sum-exp occurs in a row's cross-entropy: the sum of the row's target weights."""
    if soft is not None:
        total = soft.sum(1) if p.class_weight is None else soft @ p.class_weight
        return p.shard.sum_(total)
    smoothing = p.settings.label_smoothing
    own = 1.0 if p.share is None else p.share[first:stop]
    return (1 - smoothing) * own + p.uniform * p.weight_sum if smoothing else own


def row_coefficients(
    p: Problem, upstream: Upstream, lse: Tensor, of_lse: Tensor | float, first: int, stop: int
) -> Tensor:
    """(4, R) for ``softmax_gradient_``: lse, of_softmax, of_target, of_uniform; from (2, R) ``lse``."""
    smoothing = p.settings.label_smoothing
    out = torch.zeros(4, stop - first, dtype=p.opmath, device=lse.device)
    out[0] = lse[0]
    if upstream.loss is not None:
        out[1] = upstream.loss * of_lse
        if p.soft is not None:
            out[2] = upstream.loss
        else:
            out[2] = upstream.loss * ((1 - smoothing) * (1.0 if p.share is None else p.share[first:stop]))
            out[3] = upstream.loss * p.uniform
    if upstream.square is not None:
        out[1] += 2.0 * upstream.square * lse[0]
    if upstream.lse is not None:
        out[1] += upstream.lse
    out[1] *= (-lse[1]).exp()
    return out


def reduce_rows(p: Problem, statistics: Tensor, of_lse: Tensor | float, rows: slice, result: RowResult) -> None:
    """Fills ``result``: ce = of_lse * lse - (1 - smoothing) * share * z[target] - uniform * sum(weight * z)."""
    highest, total, expected, target_logit, weighted = statistics
    log_total = total.log()
    lse = highest + log_total
    part = lse - highest
    result.lse[0, rows] = lse
    result.lse[1, rows] = (highest - (lse - part)) + (log_total - part)
    # The maximum and the target logit are close where the model is right: subtract them before the small logarithm.
    if p.soft is not None:
        away = weighted
    else:
        smoothing = p.settings.label_smoothing
        away = target_logit if p.share is None else target_logit * p.share[rows]
        if smoothing:
            away = (1 - smoothing) * away + p.uniform * weighted
    result.loss[rows] = (of_lse * highest - away) + of_lse * log_total
    if p.settings.want_stats:
        result.entropy[rows] = (log_total - expected / total).clamp_min(0.0)
    else:
        result.entropy[rows] = 0.0
