"""What the callbacks of training loops share: one step is metered, and the plan's peak is held against it."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from memopt.metering import Meter, meter
from memopt.planner import Plan, format_bytes

METERED_STEP = 2  # counted from 0: by then the optimizer has made its states, and every block is recorded


class MeteredStep:
    """Meters the third step of a training, where ``wanted``.

    Attributes:
        result: the meter once that step has ended, None before.
    """

    def __init__(self, wanted: bool) -> None:
        self.result: Meter | None = None
        self._wanted = wanted
        self._running: Meter | None = None

    def begin(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """A step begins, counted from 0."""
        if self._wanted and step == METERED_STEP:
            self._running = meter(model, optimizer)
            self._running.__enter__()

    def end(self) -> None:
        """A step has ended, its gradients are freed."""
        if self._running is not None:
            self.result, self._running = self._running, None
            self.result.__exit__(None, None, None)

    def give_up(self) -> None:
        """Ends a measurement that is under way without a result."""
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None

    def against(self, plan: Plan | None, budget: int | str | None) -> str | None:
        """One line: the predicted and the measured peak of a step; None where there is neither."""
        parts = []
        if plan is not None:
            parts.append(f"{format_bytes(plan.peak_bytes)} predicted, budget {budget}")
        if self.result is not None:
            parts.append(f"{format_bytes(self.result.peak_bytes)} measured")
        return f"Peak memory of a step: {'; '.join(parts)}" if parts else None
