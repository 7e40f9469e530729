"""How often the parts of a row's loss occur in what is differentiated: the coefficients of its softmax gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.kernels.losses.problem import Problem


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
