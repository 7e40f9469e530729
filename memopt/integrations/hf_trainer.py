"""transformers' Trainer: an optimizer by name, the fused loss, a plan, and a report, in one line.

memopt.integrations.equip(trainer, optimizer="adamw8bit", budget="20GiB")
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from memopt.integrations.first_batch import FirstBatchPlan
from memopt.integrations.fused_head import FusedLoss, fuse_loss
from memopt.integrations.metered_step import MeteredStep
from memopt.integrations.needed import needed
from memopt.metering import Meter
from memopt.optim import Adam, AdamMini, AdamW
from memopt.optim.registry import by_name
from memopt.planner import Plan
from memopt.report.terminal import plan_page

with needed("transformers", "hf"):
    from transformers import Trainer, TrainerCallback


class MemoptCallback(TrainerCallback):
    """What happens during ``Trainer.train``: the loss is fused before it, a plan is made from its first batch.

    The plan is for the shape of that batch: pad to a fixed length. It is taken off when training ends.

    Args:
        budget: bytes of the whole step, as an integer or text such as "20GiB"; None: no plan.
        hardware: "auto" for this machine, a name from the table, a JSON file, or a ``Hardware``.
        fuse_loss: compute the loss without logits (:func:`memopt.fuse_loss`).
        loss_options: for :func:`memopt.fuse_loss`.
        meter: measure one step, the third, with :func:`memopt.meter`; that step takes up to twice as long.
        report: print the plan when it is made, and predicted and measured memory when training ends.

    Attributes:
        plan: the plan that was applied, None before the first batch and without ``budget``.
        metered: the ``memopt.Meter`` of the measured step, or None.
        fused: the handle of the fused loss, which stays on after training, or None.

    Raises:
        DoesNotFitError: (a ValueError) from ``train``: nothing fits the budget.
    """

    def __init__(
        self,
        *,
        budget: int | str | None = None,
        hardware: Any = "auto",
        fuse_loss: bool = True,
        loss_options: dict[str, Any] | None = None,
        meter: bool = False,
        report: bool = True,
    ) -> None:
        self.budget, self.hardware, self.meter, self.report = budget, hardware, meter, report
        self.fuse_loss, self.loss_options = fuse_loss, dict(loss_options or {})
        self.fused: FusedLoss | None = None
        self.console = Console()
        self._planning: FirstBatchPlan | None = None
        self._metering = MeteredStep(meter)
        self._steps = 0

    @property
    def metered(self) -> Meter | None:
        """The meter of the last training's third step, once it has ended."""
        return self._metering.result

    @property
    def plan(self) -> Plan | None:
        """The plan of the last training."""
        return None if self._planning is None else self._planning.plan

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The Trainer is built: fuse its model's loss.

        Raises:
            ValueError: arguments under which that, or a plan, cannot work.
        """
        if (self.fuse_loss or self.budget is not None) and args.n_gpu > 1:
            raise ValueError(
                f"this process sees {args.n_gpu} GPUs, so the Trainer would use DataParallel, under which plans and "
                "the fused loss do not work; start it with torchrun, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.budget is not None and args.torch_compile:
            raise ValueError(
                "budget= makes a plan for eager mode, but the TrainingArguments have torch_compile=True; leave out one "
                "of the two"
            )
        if self.fuse_loss:
            self.fused = fuse_loss(model, **self.loss_options)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Model and optimizer are as the loop will use them: wait for the first batch."""
        self._take_off()  # a training that was interrupted, or begins again with smaller batches, did not end
        self._metering, self._steps = MeteredStep(self.meter), 0
        if self.budget is not None:
            self._planning = FirstBatchPlan(
                model,
                getattr(optimizer, "optimizer", optimizer),  # accelerate wraps it
                self.budget,
                hardware=self.hardware,
                accumulate=args.gradient_accumulation_steps,
                made=lambda plan: self._say(state, plan_page(plan)),
            )

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Start to measure."""
        self._metering.begin(self._steps, model, getattr(optimizer, "optimizer", optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are freed: the measured step is over."""
        self._steps += 1
        self._metering.end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the plan off, and say what was used."""
        self._take_off()
        line = self._metering.against(self.plan, self.budget)
        if line is not None:
            self._say(state, line)

    def _take_off(self) -> None:
        self._metering.give_up()
        if self._planning is not None:
            self._planning.remove()

    def _say(self, state: Any, what: Any) -> None:
        if self.report and state.is_world_process_zero:
            self.console.print(what)


def equip(
    trainer: Trainer,
    *,
    optimizer: str | None = None,
    budget: int | str | None = None,
    hardware: Any = "auto",
    fuse_loss: bool = True,
    loss_options: dict[str, Any] | None = None,
    meter: bool = False,
    report: bool = True,
    **options: Any,
) -> MemoptCallback:
    """Give a Trainer memopt's memory savings; call it once, before ``trainer.train()``.

    Works with every subclass of ``transformers.Trainer`` that leaves the optimizer to it.

    Args:
        trainer: a Trainer that has not begun to train.
        optimizer: a name such as "adamw8bit" (see ``memopt.optim.make``). Learning rate, and for Adam, AdamW and
            AdamMini betas and epsilon, come from the TrainingArguments; weight decay comes with the Trainer's parameter
            groups. None: the Trainer's own choice, or the object that it was given as ``optimizers=``.
        budget: bytes of the whole step, as an integer or text such as "20GiB"; None: no plan.
        hardware: "auto" for this machine, a name from the table, a JSON file, or a ``Hardware``.
        fuse_loss: compute the loss without logits (:func:`memopt.fuse_loss`).
        loss_options: for :func:`memopt.fuse_loss`.
        meter: measure one step, the third; that step takes up to twice as long.
        report: print the plan when it is made, and predicted and measured memory when training ends.
        options: more options of the optimizer, before those of the TrainingArguments.

    Returns:
        The callback that it added; ``trainer.remove_callback`` takes it away, its ``fused.remove()`` the fused loss.

    Raises:
        ValueError: an unknown optimizer, a Trainer that has one already or is equipped already, options without an
            optimizer's name, a model whose loss cannot be fused, several GPUs in one process (DataParallel), a budget
            with ``torch_compile``. Nothing has changed then.
        TypeError: not a Trainer.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, not {type(trainer).__name__}")
    if any(isinstance(callback, MemoptCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError(
            "the Trainer is equipped already; call trainer.remove_callback with its MemoptCallback first, or make "
            "another Trainer"
        )
    chosen = None
    if optimizer is not None:
        if trainer.optimizer is not None:
            raise ValueError(
                f"optimizer is {optimizer!r}, but the Trainer has a {type(trainer.optimizer).__name__} already; leave "
                "out one of the two"
            )
        kind, implied = by_name(optimizer)
        args = trainer.args
        usual: dict[str, Any] = {"lr": args.learning_rate}
        if issubclass(kind, (Adam, AdamW, AdamMini)):
            usual |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        chosen = (kind, {**implied, **usual, **options})
    elif options:
        raise ValueError(f"options {sorted(options)} are for an optimizer, but none is named; give optimizer=")
    callback = MemoptCallback(
        budget=budget, hardware=hardware, fuse_loss=fuse_loss, loss_options=loss_options, meter=meter, report=report
    )
    callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.add_callback(callback)
    if chosen is not None:
        trainer.optimizer_cls_and_kwargs = chosen
    return callback
