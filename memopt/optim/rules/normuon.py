"""NorMuon (Li et al., "NorMuon: Making Muon more efficient and scalable", 2025, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memopt.kernels import State
from memopt.optim import checks, sharding
from memopt.optim.batch import Batch
from memopt.optim.optimizer import ParamsT, RuleOptimizer
from memopt.optim.orthogonal import COEFFICIENTS
from memopt.optim.rules import adamw, muon
from memopt.optim.slot import SmallState


def row_state(param: Tensor) -> SmallState:
    """The running mean square of each row of the orthogonal step."""
    return SmallState("row_avg_sq", signed=False, shape=(param.shape[0],))


class NorMuon(RuleOptimizer):
    """Muon with the orthogonal step of every neuron (row) brought to the same size; AdamW for other parameters.

    For a matrix ``[rows, columns]`` with gradient ``G``::

        B = momentum B + (1 - momentum) G
        O = orthogonalise((1 - momentum) G + momentum B)            (without nesterov: of B)
        v = beta2 v + (1 - beta2) mean over columns of O^2
        O = O / (sqrt(v) + eps), row by row
        P = P (1 - lr weight_decay) - 0.2 lr sqrt(rows columns) / ||O|| O

    Args:
        params: parameters, or groups of them as torch's optimizers take. Embeddings and output layers are matrices too
            but train better by AdamW: give them a group with ``use_muon=False``.
        lr: learning rate, a float or a tensor of one element; the step's root mean square is 0.2 of it, as AdamW's is.
        weight_decay: share of each parameter, times ``lr``, taken off every step.
        momentum: decay of the momentum.
        beta2: decay of the rows' mean squares.
        eps: added to their roots.
        nesterov: look ahead along the momentum.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: their three coefficients.
        use_muon: None: matrices by NorMuon and the rest by AdamW; True or False decides for the whole group.
        adamw_lr: AdamW's learning rate; None: ``lr``.
        adamw_betas: AdamW's.
        adamw_eps: AdamW's.
        **common: ``state`` and the other options of :class:`memopt.optim.RuleOptimizer`.

    State of a matrix: Muon's and 4 bytes a row.
    """

    rule = "normuon"
    elementwise = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-10,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        use_muon: bool | None = None,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        **common: Any,
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "beta2": beta2, "eps": eps}
        own |= {"nesterov": nesterov, "ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "use_muon": use_muon}
        own |= {"adamw_lr": adamw_lr, "adamw_betas": adamw_betas, "adamw_eps": adamw_eps}
        super().__init__(params, own, **common)

    def check(self, group: Mapping[str, Any]) -> None:
        checks.fraction(group, "beta2")
        checks.positive(group, "eps")
        checks.flag(group, "nesterov")
        muon.check_matrix_options(group)

    def states(self, group: Mapping[str, Any], param: Tensor) -> tuple[State, ...]:
        return (muon.MOMENTUM_BUFFER, row_state(param)) if muon.by_matrix(group, param) else adamw.ADAMW.states

    def update(self, batch: Batch) -> None:
        group = batch.group
        if not muon.by_matrix(group, batch.slots[0].param):
            muon.run_adamw(batch)
            return
        beta2 = float(group["beta2"])
        for one in batch.each():
            slot = one.slots[0]
            direction = muon.whole_direction(one).float()
            rows = slot.operand(row_state(slot.param))
            assert isinstance(rows, Tensor)
            rows.lerp_(direction.square().mean(1), 1.0 - beta2)
            direction /= rows.sqrt().add_(float(group["eps"]))[:, None]
            size = math.sqrt(float(sharding.reduce_sum(direction.square().sum(), slot.param)))
            scale = 0.2 * math.sqrt(slot.extent.numel) / size if size > 0 else 0.0
            muon.move(one, direction, float(group["lr"]) * scale)
        muon.advance_momentum(batch)
