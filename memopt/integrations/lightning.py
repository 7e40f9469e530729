"""Lightning: a callback that plans the activations of a training step from its first batch.

The optimizer needs no help: return one of memopt's from ``configure_optimizers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from memopt.integrations.metered_step import MeteredStep
from memopt.integrations.needed import needed
from memopt.metering import Meter
from memopt.offload import Handle, apply
from memopt.planner import Plan
from memopt.wrapping import plan_within

with needed("lightning", "lightning"):
    import lightning.pytorch as pl
    from lightning.pytorch.utilities import rank_zero_info


class MemoptCallback(pl.Callback):
    """Keeps a training step within ``budget``: traces ``training_step`` on the first batch, plans, applies the plan.

    The plan is for the shape of that batch (drop the last, smaller one, or pad). It is taken off when fitting ends.
    What ``training_step`` logs is not logged during the trace, which runs it once on tensors without data. Gradients
    are cleared before a step's first forward instead of after it, so that they do not lie beside its activations. It
    works on one device and under DDP; where the strategy shards the model, plan before sharding (docs/distributed.md).

    Args:
        budget: bytes of the whole step, as an integer or text such as "20GiB"; None: no plan.
        hardware: "auto" for this machine, a name from the table, a JSON file, or a ``Hardware``.
        meter: measure the third step with :func:`memopt.meter`; that step takes up to twice as long.

    Attributes:
        plan: the plan that was applied, None before the first batch and without ``budget``.
        metered: the ``memopt.Meter`` of the measured step, or None.

    Raises:
        DoesNotFitError: (a ValueError) from ``fit``: nothing fits the budget.
    """

    def __init__(self, budget: int | str | None = None, *, hardware: Any = "auto", meter: bool = False) -> None:
        self.budget, self.hardware, self.meter = budget, hardware, meter
        self.plan: Plan | None = None
        self._handle: Handle | None = None
        self._metering = MeteredStep(meter)
        self._batches = 0

    @property
    def metered(self) -> Meter | None:
        """The meter of the third step, once it has ended."""
        return self._metering.result

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew; a second ``fit`` plans again."""
        self.plan, self._metering, self._batches = None, MeteredStep(self.meter), 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first batch is on its device: plan for it. Two steps later: measure."""
        if pl_module.automatic_optimization and batch_idx % int(trainer.accumulate_grad_batches) == 0:
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)  # Lightning does so after the forward, which they would burden
        if self.budget is not None and self.plan is None:
            step = _Step(pl_module)
            with _Unlogged(pl_module):
                self.plan = plan_within(
                    self.budget,
                    step,
                    (batch, batch_idx),
                    trainer.optimizers[0] if trainer.optimizers else None,
                    hardware=self.hardware,
                    accumulate=min(int(trainer.accumulate_grad_batches), 2),  # the second pass is like all later ones
                )
            self._handle = apply(step, self.plan)
        number, passes_before = divmod(self._batches, int(trainer.accumulate_grad_batches))
        if not passes_before and trainer.optimizers:
            self._metering.begin(number, pl_module, trainer.optimizers[0])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The measured step is over when its optimizer has stepped."""
        self._batches += 1
        if self._batches % int(trainer.accumulate_grad_batches) == 0:
            self._metering.end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the plan off, and say what was used."""
        self._take_off()
        line = self._metering.against(self.plan, self.budget)
        if line is not None:
            rank_zero_info(line)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._take_off()

    def _take_off(self) -> None:
        self._metering.give_up()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Step(nn.Module):
    """``training_step`` as a module's forward: what a trace runs, and where a plan finds its blocks."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, batch_idx: int) -> Any:
        output = self.module.training_step(batch, batch_idx)
        return output["loss"] if isinstance(output, Mapping) else output


class _Unlogged:
    """While it is entered, the module's ``log`` and ``log_dict`` do nothing: a trace has no values to log."""

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module

    def __enter__(self) -> None:
        for name in ("log", "log_dict"):
            self._module.__dict__[name] = lambda *args, **kwargs: None

    def __exit__(self, *_: object) -> None:
        for name in ("log", "log_dict"):
            del self._module.__dict__[name]
