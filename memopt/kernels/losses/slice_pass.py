"""Vocabulary slices: the weight's gradient with each of its rows written once.

The softmax gradient of all rows against a few vocabulary entries, read back where it was kept and made again from the
log-sum-exp where not, is multiplied by ``hidden`` into the slice's rows: one rounding, no accumulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels.losses import huge_pages
from memopt.kernels.losses.coefficients import Upstream, lse_coefficient, row_coefficients
from memopt.kernels.losses.held_rows import HeldRows
from memopt.kernels.losses.logits_ops import softmax_gradient_
from memopt.kernels.losses.problem import Problem
from memopt.kernels.losses.settings import ROW_UNIT, even_chunks, rows_per_chunk


def slice_pass(
    problem: Problem, lse: Tensor, upstream: Upstream, held: HeldRows | None = None, space: Tensor | None = None
) -> Tensor:
    """The gradient of the weight, (V, H) in its dtype; ``lse`` is (2, M) over the whole vocabulary.

    ``held`` has rows that need not be made again, ``space`` is the flat scratch it left for a slice. Where ignored rows
    lie between the counted ones, those of ``hidden`` are copied together if that takes a quarter of the budget at most,
    else the ignored ones count as zero.
    """
    p, M = problem, problem.rows
    N, V = p.hidden.shape[0], p.weight.shape[0]
    held = HeldRows(p, 1, keep=False) if held is None else held
    if M == 0:
        return held.gradient.zero_()
    if not held.fits:
        return _slices_of_blocks(p, lse, upstream, held.gradient)
    if space is None:
        size = (M + N if held.spread else M) * held.entries
        space = huge_pages.empty(size, dtype=p.hidden.dtype, device=p.hidden.device)
    hidden = p.hidden if held.spread else p.hidden_rows(0, M)
    coefficients = _coefficients(p, held.again, lse, upstream)
    for low in range(0, V, held.entries):
        high = min(low + held.entries, V)
        d = space[: M * (high - low)].view(M, -1)
        held.read(d, low, high)
        if held.again:
            _make_again(p, coefficients, None if held.spread else hidden, d[: held.again], 0, slice(low, high))
        if held.spread and p.index is not None:
            behind = space[d.numel() : (M + N) * (high - low)].view(N, -1)
            d = behind.zero_().index_copy_(0, p.index, d)
        torch.mm(d.t(), hidden, out=held.gradient[low:high])
    return held.gradient


def _slices_of_blocks(p: Problem, lse: Tensor, upstream: Upstream, gradient: Tensor) -> Tensor:
    """The same where not even a narrow slice of all rows fits: products of row blocks are summed in ``opmath``."""
    M, H = p.rows, p.hidden.shape[1]
    entries = min(p.weight.shape[0], ROW_UNIT)
    wide, item = p.scale.element_size(), p.hidden.element_size()
    block = min(M, max(1, p.settings.chunk_bytes // ((entries + H) * (item + wide) + entries * wide)))
    scratch = torch.empty(block * entries, dtype=p.hidden.dtype, device=p.hidden.device)
    coefficients = _coefficients(p, M, lse, upstream)
    for low in range(0, p.weight.shape[0], entries):
        part = slice(low, min(low + entries, p.weight.shape[0]))
        total = torch.zeros(part.stop - low, H, dtype=p.opmath, device=gradient.device)
        for first in range(0, M, block):
            stop = min(first + block, M)
            d = scratch[: (stop - first) * (part.stop - low)].view(stop - first, -1)
            hidden = p.hidden_rows(first, stop)
            _make_again(p, coefficients, hidden, d, first, part)
            total.addmm_(d.t().to(p.opmath), hidden.to(p.opmath))
        gradient[part] = total
    return gradient


def _make_again(p: Problem, coefficients: Tensor, hidden: Tensor | None, out: Tensor, first: int, part: slice) -> None:
    """The softmax gradient of rows from ``first`` on, the first of ``hidden`` if given, and of entries ``part``."""
    stop = first + out.shape[0]
    weight = p.weight[part].t()
    if hidden is not None:
        torch.mm(hidden[: out.shape[0]], weight, out=out)
    else:
        for rows in even_chunks(
            out.shape[0], p.hidden.shape[1] * p.hidden.element_size(), p.settings.chunk_bytes // 16
        ):
            torch.mm(p.hidden_rows(first + rows.start, first + rows.stop), weight, out=out[rows])
    softmax_gradient_(
        out,
        coefficients[:, first:stop].contiguous(),
        None if p.target is None else p.target[first:stop] - part.start,
        None if p.bias is None else p.bias[part],
        None if p.class_weight is None else p.class_weight[part],
        p.soft_rows(first, stop, part),
        p.scale,
        p.settings.softcap,
        False,
    )


def _coefficients(p: Problem, rows: int, lse: Tensor, upstream: Upstream) -> Tensor:
    """(4, rows), made in row chunks because soft targets are summed over the whole vocabulary."""
    out = torch.empty(4, rows, dtype=p.opmath, device=lse.device)
    step = max(1, rows)
    if p.soft is not None:
        step = rows_per_chunk(rows, p.weight.shape[0] * p.scale.element_size(), p.settings.chunk_bytes)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        of_lse = lse_coefficient(p, first, stop, p.soft_rows(first, stop))
        out[:, first:stop] = row_coefficients(p, upstream.rows(first, stop), lse[:, first:stop], of_lse, first, stop)
    return out
