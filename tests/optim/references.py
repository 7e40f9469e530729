"""Rules that torch does not have, written out from the papers with plain tensor operations in the parameters' dtype.

They share nothing with memopt, keep everything unrounded and are slow on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., Tensor]


class Reference(torch.optim.Optimizer):
    """Calls ``rule(p, g, state, t, **options)`` for the new value of each parameter; ``state`` is a dict it owns."""

    def __init__(self, params: list[Tensor], rule: Step, **options: Any) -> None:
        super().__init__(params, options)
        self.rule = rule

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            for p in group["params"]:
                state = self.state[p]
                state["t"] = state.get("t", 0) + 1
                p.copy_(self.rule(p.clone(), p.grad.clone(), state, state["t"], **options))


def lion(p: Tensor, g: Tensor, state: Any, t: int, *, lr: float, betas: Any, weight_decay: float) -> Tensor:
    m = state.get("m", torch.zeros_like(p))
    state["m"] = betas[1] * m + (1 - betas[1]) * g
    return p - lr * (torch.sign(betas[0] * m + (1 - betas[0]) * g) + weight_decay * p)


def _adam_direction(g: Tensor, state: Any, t: int, betas: Any, eps: float) -> Tensor:
    m = state["m"] = betas[0] * state.get("m", torch.zeros_like(g)) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", torch.zeros_like(g)) + (1 - betas[1]) * g**2
    return m / (1 - betas[0] ** t) / (torch.sqrt(v / (1 - betas[1] ** t)) + eps)


def lamb(p: Tensor, g: Tensor, state: Any, t: int, *, lr: float, betas: Any, eps: float, weight_decay: float) -> Tensor:
    u = _adam_direction(g, state, t, betas, eps) + weight_decay * p
    ratio = p.norm() / u.norm() if p.norm() > 0 and u.norm() > 0 else 1.0
    return p - lr * ratio * u


def lars(
    p: Tensor, g: Tensor, state: Any, t: int, *, lr: float, momentum: float, weight_decay: float, trust: float
) -> Tensor:
    ratio = 1.0
    if p.norm() > 0 and g.norm() > 0:
        ratio = trust * p.norm() / (g.norm() + weight_decay * p.norm() + 1e-8)
    b = state["b"] = momentum * state.get("b", torch.zeros_like(p)) + ratio * (g + weight_decay * p)
    return p - lr * b


def ademamix(
    p: Tensor, g: Tensor, state: Any, t: int, *, lr: float, betas: Any, alpha: float, warmup: int | None, eps: float
) -> Tensor:
    beta1, beta2, beta3 = betas
    if warmup is not None:
        alpha = min(t * alpha / warmup, alpha)
        a, b = math.log(beta1), math.log(beta3)
        beta3 = min(math.exp(a * b / ((1 - t / warmup) * b + t / warmup * a)), beta3)
    slow = state["s"] = beta3 * state.get("s", torch.zeros_like(p)) + (1 - beta3) * g
    m = state["m"] = beta1 * state.get("m", torch.zeros_like(p)) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", torch.zeros_like(p)) + (1 - beta2) * g**2
    u = (m / (1 - beta1**t) + alpha * slow) / (torch.sqrt(v / (1 - beta2**t)) + eps)
    return p - lr * (u + 0.01 * p)


def _orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """The Newton-Schulz iteration; in float64 unrounded, else in bf16 as the method is used."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.bfloat16
    y = x.to(dtype)
    y = y.T if x.shape[0] > x.shape[1] else y
    y = y / y.norm()
    for _ in range(steps):
        a = y @ y.T
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return (y.T if x.shape[0] > x.shape[1] else y).to(x.dtype)


def _nesterov(p: Tensor, g: Tensor, state: Any, nesterov: bool) -> Tensor:
    b = state["b"] = 0.95 * state.get("b", torch.zeros_like(p)) + 0.05 * g
    return 0.05 * g + 0.95 * b if nesterov else b


def muon(
    p: Tensor, g: Tensor, state: Any, t: int, *, lr: float, nesterov: bool = True, adjust_lr_fn: str = "original"
) -> Tensor:
    rows, columns = p.shape
    scale = max(1, rows / columns) ** 0.5 if adjust_lr_fn == "original" else 0.2 * max(rows, columns) ** 0.5
    return p * (1 - lr * 0.1) - lr * scale * _orthogonal(_nesterov(p, g, state, nesterov))


def normuon(p: Tensor, g: Tensor, state: Any, t: int, *, lr: float) -> Tensor:
    o = _orthogonal(_nesterov(p, g, state, True))
    v = state["v"] = 0.95 * state.get("v", torch.zeros_like(p[:, 0])) + 0.05 * (o**2).mean(1)
    o = o / (v.sqrt() + 1e-10)[:, None]
    return p * (1 - lr * 0.1) - 0.2 * lr * p.numel() ** 0.5 / o.norm() * o


def adam_mini(p: Tensor, g: Tensor, state: Any, t: int, *, lr: float, betas: Any, rows_per_block: int | None) -> Tensor:
    rows = (1 if p.dim() > 1 else 0) if rows_per_block is None else rows_per_block
    m = state["m"] = betas[0] * state.get("m", torch.zeros_like(p)) + (1 - betas[0]) * g
    pieces = []
    old = state.get("v", {})
    state["v"] = {}
    for i in range(0, p.shape[0], rows or p.shape[0]):
        part = slice(i, i + (rows or p.shape[0]))
        v = state["v"][i] = betas[1] * old.get(i, 0.0) + (1 - betas[1]) * (g[part] ** 2).mean()
        pieces.append(m[part] / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8))
    return p * (1 - lr * 0.01) - lr * torch.cat(pieces)
