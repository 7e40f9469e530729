"""A plan made from the first batch that a loop trains on, for loops whose batches are out of reach."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memopt.offload import apply
from memopt.planner import Plan
from memopt.wrapping import plan_within


class FirstBatchPlan:
    """Waits for the model's first forward in training, plans for its inputs, applies the plan, and lets it go on.

    Args:
        model: the module whose forward the loop calls, directly or through a wrapper.
        optimizer: whose step the budget includes.
        budget: bytes of the whole step, as an integer or text such as "20GiB".
        hardware: as in ``memopt.plan``.
        accumulate: forward and backward passes before the optimizer's step.
        made: called with the plan as soon as there is one.

    The forward raises what :func:`memopt.wrap` raises, ``DoesNotFitError`` among it; nothing is applied then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        budget: int | str,
        *,
        hardware: Any = "auto",
        accumulate: int = 1,
        made: Callable[[Plan], None] = lambda plan: None,
    ) -> None:
        self.plan: Plan | None = None
        self._optimizer, self._budget, self._hardware = optimizer, budget, hardware
        self._accumulate, self._made = accumulate, made
        self._applied: Any = None
        self._hook = model.register_forward_pre_hook(self._entered, with_kwargs=True)

    def _entered(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        self._hook.remove()  # the trace below calls the model itself
        inputs = kwargs
        if args:
            inputs = dict(inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments)
            inputs.pop("self", None)
            inputs |= inputs.pop("kwargs", {})
        self.plan = plan_within(
            self._budget, model, inputs, self._optimizer, hardware=self._hardware, accumulate=self._accumulate
        )
        self._applied = apply(model, self.plan)
        self._applied.begin()
        self._made(self.plan)

    def remove(self) -> None:
        """Take the plan off, or stop waiting for the first batch. Safe to repeat."""
        self._hook.remove()
        if self._applied is not None:
            self._applied.remove()
