"""Row chunks: the logits of a few rows at a time, reduced and, where gradients are wanted, turned into gradients.

A chunk is one product ``hidden @ weight.T`` into scratch that is used again for every chunk; the softmax gradient
overwrites it, and two more products make the chunk's part of both gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.kernels.losses import huge_pages
from memopt.kernels.losses.coefficients import Upstream, lse_coefficient, row_coefficients
from memopt.kernels.losses.held_rows import HeldRows
from memopt.kernels.losses.logits_ops import logit_statistics, softmax_gradient_
from memopt.kernels.losses.problem import Problem, values_unknown
from memopt.kernels.losses.settings import even_chunks, rows_per_chunk
from memopt.kernels.losses.slice_pass import slice_pass
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
    are not consecutive one chunk of ``hidden`` and of its gradient. All ranks of a split vocabulary walk the same
    chunks.
    """
    p, M, settings = problem, problem.rows, problem.settings
    V, H = p.weight.shape
    device, opmath, item = p.hidden.device, p.opmath, p.hidden.element_size()
    lse = torch.empty(2, M, dtype=opmath, device=device)
    loss, entropy = torch.empty(2, M, dtype=opmath, device=device)
    argmax = torch.empty(M, dtype=torch.int64, device=device)
    result = RowResult(lse, loss, entropy, argmax, Gradients())
    made = result.gradients
    row_bytes = (p.shard.largest + (0 if p.index is None else 2 * H)) * item
    row_bytes += p.shard.largest * p.scale.element_size() if p.soft is not None else 0
    chunks, most = even_chunks(M, row_bytes, settings.chunk_bytes), rows_per_chunk(M, row_bytes, settings.chunk_bytes)
    held = sink = None
    if upstream is not None:
        if wanted.weight and settings.accumulate == "once" and item == 2 and most < M:
            held = HeldRows(p, row_bytes)
            chunks = held.chunks()
        elif wanted.weight:
            sink = WeightGradient(p.weight, settings)
        if wanted.hidden:
            made.hidden = torch.empty_like(p.hidden) if p.index is None else torch.zeros_like(p.hidden)
        made.bias = torch.zeros(V, dtype=opmath, device=device) if wanted.bias else None
        made.scale = torch.zeros((), dtype=opmath, device=device) if wanted.scale else None
    size = min(most, M) * V if held is None else max(V, settings.chunk_bytes // item)
    scratch = huge_pages.empty(size, dtype=p.hidden.dtype, device=device)
    weight_t = p.weight.t()
    for rows in chunks:
        first, stop = rows.start, rows.stop
        h, target, soft = p.hidden_rows(first, stop), p.target_rows(first, stop), p.soft_rows(first, stop)
        logits = torch.mm(h, weight_t, out=scratch[: (stop - first) * V].view(stop - first, V))
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
            _write_hidden_gradient(p, made.hidden, logits, rows)
        if held is not None:
            held.add(logits, rows)
        elif sink is not None:
            sink.add(logits, h)
    if held is not None and upstream is not None:
        made.weight = slice_pass(p, result.lse, upstream, held, scratch[held.behind * V :])
    elif sink is not None:
        made.weight = sink.finish()
    for shared in (made.hidden, made.scale):
        if shared is not None:
            p.shard.sum_(shared)
    return result


def _write_hidden_gradient(p: Problem, out: Tensor, d: Tensor, rows: slice) -> None:
    """``out`` (N, H) at the rows of this chunk becomes d @ weight."""
    # In 16 bits on a CPU the product of both transposes is up to 7 % faster than the product itself.
    swapped = d.device.type == "cpu" and d.element_size() == 2
    if p.index is not None:
        out.index_copy_(0, p.index[rows], torch.mm(p.weight.t(), d.t()).t() if swapped else torch.mm(d, p.weight))
    elif swapped:
        out[rows] = torch.mm(p.weight.t(), d.t()).t()
    else:
        torch.mm(d, p.weight, out=out[rows])


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
