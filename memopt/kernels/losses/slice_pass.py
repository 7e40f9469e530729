"""Vocabulary slices: the weight's gradient with each of its rows written once.

The logits of all rows against a few vocabulary entries are made again from the log-sum-exp of the forward pass, turned
into the softmax gradient, and multiplied by ``hidden`` into the slice's rows: one rounding, no accumulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels.losses.logits_ops import softmax_gradient_
from memopt.kernels.losses.problem import Problem
from memopt.kernels.losses.row_pass import Upstream, lse_coefficient, row_coefficients
from memopt.kernels.losses.settings import rows_per_chunk

_LEAST_ENTRIES = 256  # a narrower slice makes a slow product; more rows than fit with it are taken block by block


def slice_pass(problem: Problem, lse: Tensor, upstream: Upstream) -> Tensor:
    """The gradient of the weight, (V, H) in its dtype; ``lse`` is (2, M) over the whole vocabulary.

    Scratch: M rows by a slice of entries, at most ``settings.chunk_bytes``. Where even 256 entries by M rows are more
    than that, rows are taken in blocks whose products are summed in float32 for one slice at a time. Where some rows do
    not count, the counted rows of ``hidden`` are copied once.
    """
    p, M = problem, problem.rows
    V, H = p.weight.shape
    gradient = torch.empty_like(p.weight)
    if M == 0:
        return gradient.zero_()
    item = p.hidden.element_size() + (p.scale.element_size() if p.soft is not None else 0)
    block = min(M, max(1, p.settings.chunk_bytes // (item * min(V, _LEAST_ENTRIES))))
    entries = rows_per_chunk(V, block * item, p.settings.chunk_bytes)
    hidden = p.hidden_rows(0, M)
    coefficients = _coefficients(p, lse, upstream)
    scratch = torch.empty(block * entries, dtype=p.hidden.dtype, device=p.hidden.device)
    for low in range(0, V, entries):
        part = slice(low, min(low + entries, V))
        width = part.stop - low
        bias = None if p.bias is None else p.bias[part]
        class_weight = None if p.class_weight is None else p.class_weight[part]
        total = None if block == M else torch.zeros(width, H, dtype=p.opmath, device=gradient.device)
        for first in range(0, M, block):
            stop = min(first + block, M)
            logits = scratch[: (stop - first) * width].view(stop - first, width)
            torch.mm(hidden[first:stop], p.weight[part].t(), out=logits)
            target = None if p.target is None else p.target[first:stop] - low
            softmax_gradient_(
                logits,
                coefficients[:, first:stop].contiguous(),
                target,
                bias,
                class_weight,
                p.soft_rows(first, stop, part),
                p.scale,
                p.settings.softcap,
                False,
            )
            if total is None:
                torch.mm(logits.t(), hidden, out=gradient[part])
            else:
                total += logits.t() @ hidden[first:stop]
        if total is not None:
            gradient[part] = total
    return gradient


def _coefficients(p: Problem, lse: Tensor, upstream: Upstream) -> Tensor:
    """(4, M), made in row chunks because soft targets are summed over the whole vocabulary."""
    out = torch.empty(4, p.rows, dtype=p.opmath, device=lse.device)
    step = p.rows
    if p.soft is not None:
        step = rows_per_chunk(p.rows, p.weight.shape[0] * p.scale.element_size(), p.settings.chunk_bytes)
    for first in range(0, p.rows, step):
        stop = min(first + step, p.rows)
        of_lse = lse_coefficient(p, first, stop, p.soft_rows(first, stop))
        out[:, first:stop] = row_coefficients(p, upstream.rows(first, stop), lse[:, first:stop], of_lse, first, stop)
    return out
