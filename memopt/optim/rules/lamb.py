"""LAMB (You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memopt.kernels import State, Update
from memopt.kernels.math import sqrt
from memopt.optim import checks
from memopt.optim.batch import Batch
from memopt.optim.optimizer import ParamsT, RuleOptimizer
from memopt.optim.rules.adamw import EXP_AVG, EXP_AVG_SQ, moments

SCALARS = (
    "grad_scale", "beta1", "beta1_comp", "beta2", "beta2_comp", "bias1_inv", "sqrt_bias2_inv", "eps", "decay",
)  # fmt: skip


def _direction(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, Any, Any]:
    m, v = states
    m, v = moments(g * s.grad_scale, m, v, s)
    return s.bias1_inv * m / (sqrt(v) * s.sqrt_bias2_inv + s.eps) + s.decay * p, m, v


def norms_update(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """Writes nothing; sums the squares of the parameter and of the direction it is about to take."""
    u, _, _ = _direction(p, g, states, s)
    return p, states, (p * p, u * u)


def lamb_update(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    """One element: a step of ``step_size``, the learning rate times the trust ratio."""
    u, m, v = _direction(p, g, states, s)
    return p - s.step_size * u, (m, v)


NORMS = Update("lamb_norms", (EXP_AVG, EXP_AVG_SQ), SCALARS, norms_update, reductions=("param_sq", "direction_sq"))
LAMB_STEP = Update("lamb", (EXP_AVG, EXP_AVG_SQ), (*SCALARS, "step_size"), lamb_update)


def trust_ratio(param_sq: float, direction_sq: float, largest: float | None) -> float:
    """``||p|| / ||u||``, or 1 where either is 0; at most ``largest``."""
    ratio = math.sqrt(param_sq / direction_sq) if param_sq > 0 and direction_sq > 0 else 1.0
    return ratio if largest is None else min(ratio, largest)


class LAMB(RuleOptimizer):
    """Adam's direction with each parameter tensor moved in proportion to its own norm.

    With gradient ``g`` at step ``t``::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
        p = p - lr ||p|| / ||u|| u                  (ratio 1 where a norm is 0)

    Args:
        params: parameters, or groups of them as torch's optimizers take.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: share of the parameter in the direction.
        max_trust: largest ratio of the norms; None for no limit.
        **common: ``state`` and the other options of :class:`memopt.optim.RuleOptimizer`.

    State: 8 bytes a parameter in fp32, 2.03 in 8bit, 1.06 in 4bit. Two passes over a parameter a step; the norms are
    read on the host. ``max_trust`` stands for the bounds of the paper's scaling function.
    """

    rule = "lamb"
    elementwise = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        max_trust: float | None = None,
        **common: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_trust": max_trust}
        super().__init__(params, own, **common)

    def check(self, group: Mapping[str, Any]) -> None:
        checks.non_negative(group, "lr", "eps", "weight_decay")
        checks.fractions(group, "betas", 2)
        if group["max_trust"] is not None:
            checks.positive(group, "max_trust")

    def states(self, group: Mapping[str, Any], param: Tensor) -> tuple[State, ...]:
        return LAMB_STEP.states

    def update(self, batch: Batch) -> None:
        group = batch.group
        beta1, beta2 = (float(b) for b in group["betas"])
        scalars = {
            "grad_scale": batch.grad_scale,
            "beta1": beta1,
            "beta1_comp": 1.0 - beta1,
            "beta2": beta2,
            "beta2_comp": 1.0 - beta2,
            "bias1_inv": 1.0 / (1.0 - beta1**batch.step),
            "sqrt_bias2_inv": 1.0 / math.sqrt(1.0 - beta2**batch.step),
            "eps": float(group["eps"]),
            "decay": float(group["weight_decay"]),
        }
        sums = batch.run(NORMS, scalars)
        pairs = zip(sums["param_sq"].tolist(), sums["direction_sq"].tolist(), strict=True)
        for one, (param_sq, direction_sq) in zip(batch.each(), pairs, strict=True):
            ratio = trust_ratio(param_sq, direction_sq, group["max_trust"])
            one.run(LAMB_STEP, {**scalars, "step_size": float(group["lr"]) * ratio})
