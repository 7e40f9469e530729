"""RMSprop (Tieleman and Hinton, lecture 6.5 of "Neural Networks for Machine Learning", 2012)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from memopt.kernels import State, Update
from memopt.kernels.math import maximum, sqrt
from memopt.optim import checks
from memopt.optim.batch import Batch
from memopt.optim.formats import get_format
from memopt.optim.optimizer import ParamsT, RuleOptimizer

SQUARE_AVG = State("square_avg", signed=False)
GRAD_AVG = State("grad_avg", signed=True)
MOMENTUM_BUFFER = State("momentum_buffer", signed=True)
SCALARS = ("grad_scale", "l2", "keep", "alpha", "alpha_comp", "eps", "lr", "momentum")


@lru_cache(maxsize=4)
def variant(centered: bool, momentum: bool) -> Update:
    """The update with or without the gradient's mean and with or without momentum."""

    def rmsprop_update(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
        g = g * s.grad_scale + s.l2 * p
        square = s.alpha * states[0] + s.alpha_comp * (g * g)
        new = [square]
        variance = square
        if centered:
            mean = s.alpha * states[1] + s.alpha_comp * g
            new.append(mean)
            variance = maximum(square - mean * mean, 0.0)
        step = g / (sqrt(variance) + s.eps)
        if momentum:
            step = s.momentum * states[-1] + step
            new.append(step)
        return s.keep * p - s.lr * step, tuple(new)

    states = (SQUARE_AVG, *((GRAD_AVG,) if centered else ()), *((MOMENTUM_BUFFER,) if momentum else ()))
    name = "rmsprop" + "_centered" * centered + "_momentum" * momentum
    return Update(name, states, SCALARS if momentum else SCALARS[:-1], rmsprop_update)


class RMSprop(RuleOptimizer):
    """Steps divided by the root of a running mean of squared gradients.

    With gradient ``g``::

        g = g + weight_decay p
        v = alpha v + (1 - alpha) g^2
        d = g / (sqrt(v) + eps)                     (centered: sqrt(v - a^2), a the running mean of g)
        b = momentum b + d
        p = p - lr b

    Args:
        params: parameters, or groups of them as torch's optimizers take.
        lr: learning rate, a float or a tensor of one element.
        alpha: decay of the running means.
        eps: added to the root.
        weight_decay: how much of the parameter joins its gradient.
        momentum: decay of the momentum; 0 keeps none.
        centered: divide by the deviation instead of the root mean square; one state more. Refused with low-bit
            formats: the difference of two rounded numbers is mostly rounding.
        decoupled_weight_decay: take ``lr weight_decay`` of the parameter off instead.
        **common: ``state`` and the other options of :class:`memopt.optim.RuleOptimizer`.

    State: 4 bytes a parameter in fp32, 1.02 in 8bit, 0.53 in 4bit; as much again with momentum.
    """

    rule = "rmsprop"
    optional = (GRAD_AVG, MOMENTUM_BUFFER)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **common: Any,
    ) -> None:
        own = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        own |= {"centered": centered, "decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, own, **common)

    def check(self, group: Mapping[str, Any]) -> None:
        checks.non_negative(group, "lr", "eps", "weight_decay", "momentum")
        checks.fraction(group, "alpha")
        checks.flag(group, "centered", "decoupled_weight_decay")
        if group["centered"] and get_format(group["state"]).name != "fp32":
            raise ValueError(
                f"centered RMSprop keeps the difference of two moments, which state={group['state']!r} would drown in "
                "rounding; use state='fp32' or centered=False"
            )

    def _update(self, group: Mapping[str, Any]) -> Update:
        return variant(bool(group["centered"]), float(group["momentum"]) != 0.0)

    def states(self, group: Mapping[str, Any], param: Tensor) -> tuple[State, ...]:
        return self._update(group).states

    def update(self, batch: Batch) -> None:
        group = batch.group
        alpha = float(group["alpha"])
        scalars = {
            "grad_scale": batch.grad_scale,
            "alpha": alpha,
            "alpha_comp": 1.0 - alpha,
            "eps": float(group["eps"]),
            "lr": float(group["lr"]),
            "momentum": float(group["momentum"]),
            **checks.decay(group),
        }
        batch.run(self._update(group), scalars)
