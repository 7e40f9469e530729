"""Shared by the tests of the vocabulary loss: cases as data, one runner, and a tolerance that comes from float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.losses import dense_linear_cross_entropy, linear_cross_entropy

NAMES = ("loss", "log_sum_exp", "entropy", "accuracy", "hidden", "weight", "bias", "logit_scale")
TARGET = torch.tensor([1, 2, 3, -100, 5, 8])  # six rows, a vocabulary of nine


@dataclass
class Case:
    """Inputs in float64 that every dtype of a test is rounded from, and the arguments of the loss."""

    options: dict[str, Any]
    shape: tuple[int, ...] = (3, 17)
    H: int = 24
    V: int = 101
    bias: bool = False
    scale: float | None = None
    class_weight: bool = False
    soft: bool = False
    ignored: bool = True
    half_ignored: bool = False
    tensors: dict[str, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        double = {"dtype": torch.float64, "generator": generator}
        target = torch.randint(0, self.V, self.shape, generator=generator)
        if self.ignored:
            target.view(-1)[3:7] = self.options.get("ignore_index", -100)
            target.view(-1)[-2] = self.options.get("ignore_index", -100)
        if self.half_ignored:
            target[torch.rand(self.shape, generator=generator) < 0.5] = -100
        if self.soft:
            target = torch.randn(*self.shape, self.V, **double).mul(3).softmax(-1).float()
        self.tensors = {
            "hidden": torch.randn(*self.shape, self.H, **double),
            "weight": torch.randn(self.V, self.H, **double) / 2,
            "target": target,
            "bias": torch.randn(self.V, **double) if self.bias else None,
            "logit_scale": None if self.scale is None else torch.tensor(self.scale, dtype=torch.float64),
            "class_weight": torch.rand(self.V, **double) + 0.1 if self.class_weight else None,
        }

    def run(self, function: Any, round_to: torch.dtype, compute_in: torch.dtype, **extra: Any) -> dict[str, Tensor]:
        """Loss, statistics and gradients for inputs rounded to one dtype and computed with in another."""
        leaves = {
            name: None if t is None else t.to(round_to).to(compute_in, copy=True).requires_grad_()
            for name, t in self.tensors.items()
            if name not in ("target", "class_weight")
        }
        weights = self.tensors["class_weight"]
        loss, stats = function(
            leaves["hidden"],
            leaves["weight"],
            self.tensors["target"],
            leaves["bias"],
            logit_scale=leaves["logit_scale"],
            class_weight=None if weights is None else weights.to(round_to).to(compute_in),
            return_stats=True,
            **self.options,
            **extra,
        )
        # An upstream gradient that differs from row to row shows a gradient that forgot it.
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape)
        (loss * upstream.to(loss.dtype)).sum().backward()
        results = [loss.detach(), *(part.detach() for part in stats)]
        results += [leaves[name] if leaves[name] is None else leaves[name].grad for name in NAMES[4:]]
        return {name: value for name, value in zip(NAMES, results, strict=True) if value is not None}


def error(value: Tensor, truth: Tensor) -> float:
    """Distance in norm, relative to the truth's norm where that is not zero."""
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-12))


def check_against_truth(case: Case, dtype: torch.dtype, **extra: Any) -> None:
    """Ours is no further from the float64 truth than the plain loss computed in ``dtype``: see :func:`ratio_limit`.

    Where the plain loss is exact up to the last place (float64, float32) a few units in it are granted. Loss and
    statistics of a few rows also hang on single logits, each off by half a unit.
    """
    truth = case.run(dense_linear_cross_entropy, dtype, torch.float64)
    plain = case.run(dense_linear_cross_entropy, dtype, dtype, upcast=False)
    ours = case.run(linear_cross_entropy, dtype, dtype, **extra)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert value.shape == truth[name].shape, name
        check_no_further(name, value, plain[name], truth[name], dtype)


def check_no_further(name: str, ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """``error(ours) <= limit * error(plain) + floor`` for a value called ``name`` in :data:`NAMES`."""
    noise = 4e-15 if dtype == torch.float64 else 4e-7
    floor = max(noise, torch.finfo(dtype).eps / 2) if name in NAMES[:3] else noise
    limit = ratio_limit(ours, plain, truth)
    assert error(ours, truth) <= limit * error(plain, truth) + floor, (name, error(ours, truth), limit)


def check_as_close(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Ours is no further from the truth than the plain result: in norm, and of a matrix at the worst element too."""
    assert ours.shape == plain.shape == truth.shape
    assert error(ours, truth) <= ratio_limit(ours, plain, truth) * error(plain, truth) + 4e-7
    if truth.dim() > 1:
        worst = [float((value.double() - truth).abs().max()) for value in (ours, plain)]
        assert worst[0] <= 2 * worst[1] + 4 * 2.0**-24 * float(truth.abs().max())


def ratio_limit(ours: Tensor, plain: Tensor, truth: Tensor) -> float:
    """How far the ratio of two errors in norm may exceed one by chance when both have the same expectation.

    A squared error is a sum over rows of independent parts s. Its relative variance is about sum(s^2) / sum(s)^2, one
    over the effective number of rows n; by the delta method the logarithm of a ratio of two norms has the standard
    deviation sqrt(1 / n_ours + 1 / n_plain) / 2. Four of them are passed by chance once in 30000 comparisons.
    """
    spread = 0.0
    for value in (ours, plain):
        parts = (value.double() - truth).square().reshape(value.shape[0] if value.dim() else 1, -1).sum(1)
        spread += float(parts.square().sum() / parts.sum().square().clamp_min(1e-300))
    return math.exp(4 * 0.5 * math.sqrt(spread))


def small_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states and weights for ``TARGET``."""
    return torch.randn(6, 8, dtype=dtype).requires_grad_(), torch.randn(9, 8, dtype=dtype).requires_grad_()
