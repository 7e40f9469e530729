"""Adam (Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memopt.kernels import State, Update
from memopt.kernels.math import maximum, sqrt
from memopt.optim import checks
from memopt.optim.batch import Batch
from memopt.optim.optimizer import ParamsT, RuleOptimizer
from memopt.optim.rules import adamw

SCALARS = (*adamw.SCALARS, "l2")


def adam_update(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    """One element; weight decay is ``l2 p`` in the gradient or ``keep`` on the parameter, whichever is not idle."""
    m, v = states
    m, v = adamw.moments(g * s.grad_scale + s.l2 * p, m, v, s)
    return s.keep * p - s.step_size * m / (sqrt(v) * s.sqrt_bias2_inv + s.eps), (m, v)


def adam_amsgrad_update(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    """The same with the largest second moment so far in the denominator (Reddi et al., 2018)."""
    m, v, largest = states
    m, v = adamw.moments(g * s.grad_scale + s.l2 * p, m, v, s)
    largest = maximum(largest, v)
    return s.keep * p - s.step_size * m / (sqrt(largest) * s.sqrt_bias2_inv + s.eps), (m, v, largest)


ADAM = Update("adam", adamw.ADAMW.states, SCALARS, adam_update)
ADAM_AMSGRAD = Update("adam_amsgrad", adamw.ADAMW_AMSGRAD.states, SCALARS, adam_amsgrad_update)


class Adam(RuleOptimizer):
    """Adam, with weight decay as a part of the gradient.

    With gradient ``g`` at step ``t``::

        g = g + weight_decay p
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: parameters, or groups of them as torch's optimizers take.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: how much of the parameter joins its gradient.
        amsgrad: use the largest second moment seen so far; one state more.
        decoupled_weight_decay: take the decay off the parameters instead, as ``AdamW`` does.
        **common: ``state`` and the other options of :class:`memopt.optim.RuleOptimizer`.

    State: 8 bytes a parameter in fp32, 2.03 in 8bit, 1.06 in 4bit; half as much again with ``amsgrad``.
    """

    rule = "adam"
    optional = (adamw.MAX_EXP_AVG_SQ,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        amsgrad: bool = False,
        decoupled_weight_decay: bool = False,
        **common: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**own, "decoupled_weight_decay": decoupled_weight_decay}, **common)

    def check(self, group: Mapping[str, Any]) -> None:
        checks.non_negative(group, "lr", "eps", "weight_decay")
        checks.fractions(group, "betas", 2)
        checks.flag(group, "amsgrad", "decoupled_weight_decay")

    def _update(self, group: Mapping[str, Any]) -> Update:
        return ADAM_AMSGRAD if group["amsgrad"] else ADAM

    def states(self, group: Mapping[str, Any], param: Tensor) -> tuple[State, ...]:
        return self._update(group).states

    def update(self, batch: Batch) -> None:
        group = batch.group
        scalars = adamw.adam_scalars(group, batch.step, batch.grad_scale)
        batch.run(self._update(group), {**scalars, **checks.decay(group)})
