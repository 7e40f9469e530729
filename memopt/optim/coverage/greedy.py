"""Measures the gradient norm of every block of a model in one backward pass, keeping no gradient of frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from memopt.optim.coverage.blocks import Block
from memopt.optim.sharding import local_of


class GradientNorms:
    """Between ``start`` and ``stop`` frozen parameters require gradients, each of which is dropped once measured.

    Squares of several backward passes (micro-batches) are added up for frozen parameters; of active ones, whose
    gradients add up themselves, the last is taken.
    """

    def __init__(self) -> None:
        self._scores = torch.zeros(0, dtype=torch.float64)
        self._homes: dict[Tensor, list[int]] = {}  # each parameter's blocks; empty while at rest
        self._frozen: list[Tensor] = []
        self._hooks: list[Any] = []
        self._latest: dict[Tensor, Tensor | None] = {}  # of each active parameter, once a backward pass has reached it

    def start(self, blocks: Sequence[Block], active: set[Tensor]) -> None:
        """Measure from the next backward pass on; ``active`` parameters are trained and keep their gradients."""
        if self._homes:
            return
        self._scores = torch.zeros(len(blocks), dtype=torch.float64)
        for number, block in enumerate(blocks):
            for param in block.params:
                self._homes.setdefault(param, []).append(number)
        self._latest = dict.fromkeys(param for param in self._homes if param in active)
        for param, numbers in self._homes.items():
            hook: Callable[[Tensor], None] = self._record
            if param not in active:
                param.requires_grad_(True)
                self._frozen.append(param)
                hook = self._measurer(numbers)
            self._hooks.append(cast(Any, param).register_post_accumulate_grad_hook(hook))

    def stop(self) -> None:
        """Freeze again what was frozen, and forget what was measured."""
        for hook in self._hooks:
            hook.remove()
        for param in self._frozen:
            param.requires_grad_(False)
        self._homes, self._frozen, self._hooks, self._latest = {}, [], [], {}

    def largest(self, group: dist.ProcessGroup | None) -> int:
        """The block with the largest gradient norm; ranks add up what each has seen, so that all choose alike."""
        for param, squares in self._latest.items():
            if param.grad is not None:
                self._scores[self._homes[param]] += _squares(param.grad) if squares is None else squares
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._scores, group=group)
        return int(self._scores.argmax())

    def _record(self, param: Tensor) -> None:
        """The active block's gradients are measured in backward too: a GradScaler divides them before the step."""
        if param.grad is not None:
            self._latest[param] = _squares(param.grad)

    def _measurer(self, numbers: list[int]) -> Callable[[Tensor], None]:
        scores = self._scores

        def measure(param: Tensor) -> None:
            if param.grad is not None:
                scores[numbers] += _squares(param.grad)
                param.grad = None

        return measure


def _squares(grad: Tensor) -> Tensor:
    """The sum of squares of the part held here; 0 where it is not finite, as after an overflow that is skipped."""
    return local_of(grad).float().square().sum().double().cpu().nan_to_num(nan=0.0, posinf=0.0)
