"""Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import State, Update
from memopt.optim import checks, sharding
from memopt.optim.batch import Batch
from memopt.optim.optimizer import ParamsT, RuleOptimizer
from memopt.optim.orthogonal import COEFFICIENTS, orthogonalise
from memopt.optim.rules import adamw
from memopt.optim.slot import Slot

MOMENTUM_BUFFER = State("momentum_buffer", signed=True)


def momentum_update(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    """One element of the momentum; the parameter stays."""
    (buffer,) = states
    return p, (s.momentum * buffer + s.momentum_comp * (g * s.grad_scale),)


def move_update(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    """One element of the parameter; ``g`` is the orthogonal direction."""
    return s.keep * p - s.step_size * g, ()


MOMENTUM = Update("muon_momentum", (MOMENTUM_BUFFER,), ("grad_scale", "momentum", "momentum_comp"), momentum_update)
MOVE = Update("muon_move", (), ("keep", "step_size"), move_update)

ADJUSTMENTS = ("original", "match_rms_adamw")


def adjustment(shape: tuple[int, ...], kind: str) -> float:
    """What the learning rate is multiplied by for a matrix of this shape."""
    rows, columns = shape
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Muon(RuleOptimizer):
    """Momentum whose step is made orthogonal, for matrices; AdamW for every other parameter.

    For a matrix with gradient ``G``::

        B = momentum B + (1 - momentum) G
        O = orthogonalise((1 - momentum) G + momentum B)            (without nesterov: of B)
        P = P (1 - lr weight_decay) - lr adjust(rows, columns) O

    Args:
        params: parameters, or groups of them as torch's optimizers take. Embeddings and output layers are matrices too
            but train better by AdamW: give them a group with ``use_muon=False``.
        lr: learning rate, a float or a tensor of one element.
        weight_decay: share of each parameter, times ``lr``, taken off every step.
        momentum: decay of the momentum.
        nesterov: look ahead along the momentum.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: their three coefficients.
        adjust_lr_fn: ``"original"``: ``sqrt(max(1, rows / columns))``; ``"match_rms_adamw"``:
            ``0.2 sqrt(max(rows, columns))``, with which AdamW's learning rate and decay fit.
        use_muon: None: matrices by Muon and the rest by AdamW; True or False decides for the whole group.
        adamw_lr: AdamW's learning rate; None: ``lr``.
        adamw_betas: AdamW's.
        adamw_eps: AdamW's.
        **common: ``state`` and the other options of :class:`memopt.optim.RuleOptimizer`.

    State of a matrix: 4 bytes a parameter in fp32, 1.02 in 8bit, 0.53 in 4bit. Temporaries: the decoded momentum and
    the iteration's matrices, of one parameter at a time.
    """

    rule = "muon"
    elementwise = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        adjust_lr_fn: str = "original",
        use_muon: bool | None = None,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        **common: Any,
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        own |= {"ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "adjust_lr_fn": adjust_lr_fn}
        own |= {"use_muon": use_muon, "adamw_lr": adamw_lr, "adamw_betas": adamw_betas, "adamw_eps": adamw_eps}
        super().__init__(params, own, **common)

    def check(self, group: Mapping[str, Any]) -> None:
        checks.one_of(group, "adjust_lr_fn", ADJUSTMENTS)
        checks.flag(group, "nesterov")
        check_matrix_options(group)

    def states(self, group: Mapping[str, Any], param: Tensor) -> tuple[State, ...]:
        return (MOMENTUM_BUFFER,) if by_matrix(group, param) else adamw.ADAMW.states

    def update(self, batch: Batch) -> None:
        if not by_matrix(batch.group, batch.slots[0].param):
            run_adamw(batch)
            return
        group = batch.group
        for one in batch.each():
            direction = whole_direction(one)
            scale = adjustment(one.slots[0].extent.shape, group["adjust_lr_fn"])
            move(one, direction, float(group["lr"]) * scale)
        advance_momentum(batch)


def check_matrix_options(group: Mapping[str, Any]) -> None:
    """The options that Muon and NorMuon share."""
    checks.non_negative(group, "lr", "weight_decay", "adamw_eps")
    checks.fraction(group, "momentum")
    checks.fractions(group, "adamw_betas", 2)
    checks.whole(group, "ns_steps", minimum=1)
    checks.numbers(group, "ns_coefficients", 3, math.isfinite, "finite numbers")
    checks.one_of(group, "use_muon", (None, True, False))
    if group["adamw_lr"] is not None:
        checks.non_negative(group, "adamw_lr")
    if group["use_muon"]:
        for param in group.get("params", ()):
            if isinstance(param, Tensor) and param.dim() != 2:
                raise ValueError(
                    f"use_muon=True with a parameter of shape {tuple(param.shape)}; it takes matrices: put the others "
                    "in a group of their own, or leave use_muon=None"
                )


def by_matrix(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether the parameter takes the orthogonal step (the others take AdamW's)."""
    wanted = group["use_muon"]
    return param.dim() == 2 if wanted is None else bool(wanted)


def run_adamw(batch: Batch) -> None:
    """AdamW's step with the ``adamw_`` options of the group."""
    group = batch.group
    lr = group["lr"] if group["adamw_lr"] is None else group["adamw_lr"]
    options = {**group, "lr": lr, "betas": group["adamw_betas"], "eps": group["adamw_eps"]}
    batch.run(adamw.ADAMW, adamw.adam_scalars(options, batch.step, batch.grad_scale))


def whole_direction(one: Batch) -> Tensor:
    """The orthogonal direction of a batch of one; of a sharded matrix, gathered for it, the part held here."""
    group, param = one.group, one.slots[0].param
    momentum = sharding.gather_like(nesterov_direction(one, group["nesterov"]), param)
    return sharding.part_of(orthogonalise(momentum, group["ns_steps"], tuple(group["ns_coefficients"])), param)


def nesterov_direction(one: Batch, nesterov: bool) -> Tensor:
    """The momentum of a batch of one with its gradient taken in, fp32; nothing is stored."""
    slot: Slot = one.slots[0]
    momentum = float(one.group["momentum"])
    grad = one.grad(0).to(torch.float32) * one.grad_scale
    buffer = slot.decode(MOMENTUM_BUFFER).lerp_(grad, 1.0 - momentum)
    return grad.lerp_(buffer, momentum) if nesterov else buffer


def move(one: Batch, direction: Tensor, step_size: float) -> None:
    """Decay the parameter of a batch of one and take ``step_size`` times ``direction`` off it."""
    keep = 1.0 - float(one.group["lr"]) * float(one.group["weight_decay"])
    one.run(MOVE, {"keep": keep, "step_size": step_size}, [direction.contiguous()])


def advance_momentum(batch: Batch) -> None:
    """Take the gradients into the momentum, in the stored format."""
    momentum = float(batch.group["momentum"])
    batch.run(MOMENTUM, {"grad_scale": batch.grad_scale, "momentum": momentum, "momentum_comp": 1.0 - momentum})
