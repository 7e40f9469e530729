"""One call around an existing training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from memopt.planner import Hardware, Plan


class DoesNotFitError(ValueError):
    """No plan keeps the step within the budget; ``plan`` says what the smallest budget is and what binds."""

    def __init__(self, message: str, plan: Plan) -> None:
        super().__init__(message)
        self.plan = plan


def wrap(
    model: nn.Module,
    *,
    inputs: Any,
    optimizer: str | Optimizer = "adamw8bit",
    budget: int | str,
    hardware: str | Hardware = "auto",
    loss_fn: Callable[..., Tensor] | None = None,
    **options: Any,
) -> tuple[nn.Module, Optimizer, Plan]:
    """Make a training loop fit into ``budget``: build the optimizer, plan the activations and apply the plan.

    The model is returned as it came in, with the plan's hooks on its blocks: train it as before. To take the plan off
    again, keep the result of ``memopt.apply`` instead of using this function.

    Args:
        model: the module that the loop calls; its parameters are trained where ``requires_grad`` is set.
        inputs: one batch as the loop passes it: a tuple of positional or a dict of keyword arguments.
        optimizer: a name such as ``"adamw8bit"`` (see ``memopt.optim.make``) or an optimizer already built.
        budget: bytes of the whole step, as an integer or text such as ``"20GiB"``.
        hardware: ``"auto"`` for this machine, a name from the table, a JSON file, or a ``Hardware``.
        loss_fn: makes the scalar loss from the model's output; by default the output itself or its ``loss``.
        options: for the optimizer, when it is given by name: ``lr``, ``betas``, ``weight_decay``, ...

    Returns:
        The model, the optimizer and the plan that was applied.

    Raises:
        DoesNotFitError: nothing fits; the message names the smallest budget that would, and nothing has been applied.
        ValueError: an unknown optimizer or hardware, a budget that cannot be read, or a model that cannot be traced;
            nothing has been applied.
    """
    from memopt.offload import apply
    from memopt.optim import make

    built: Optimizer
    if isinstance(optimizer, str):
        built = make(optimizer, model.parameters(), **options)
    elif options:
        raise ValueError(
            f"options {sorted(options)} came with an optimizer that is already built ({type(optimizer).__name__}); "
            "pass them to its constructor instead, or give the optimizer by name"
        )
    else:
        built = optimizer
    chosen = plan_within(budget, model, inputs, built, hardware=hardware, loss_fn=loss_fn)
    apply(model, chosen)
    return model, built, chosen


def plan_within(
    budget: int | str,
    model: nn.Module,
    inputs: Any,
    optimizer: Optimizer | None,
    *,
    hardware: str | Hardware = "auto",
    loss_fn: Callable[..., Tensor] | None = None,
    accumulate: int = 1,
) -> Plan:
    """Trace one step and plan it; the arguments are those of :func:`wrap`.

    ``accumulate`` is the number of forward and backward passes before the optimizer's step. From the second on the
    gradients of those before are alive all the time and nothing else changes: two passes are traced for any more.

    Raises:
        DoesNotFitError: nothing fits; the message names the smallest budget that would.
        ValueError: see :func:`wrap`.
    """
    from memopt.planner import format_bytes, plan, trace

    on = "cuda" if any(p.is_cuda for p in model.parameters()) else "cpu"
    traced = trace(
        model, inputs, loss_fn=loss_fn, optimizer=optimizer, accumulate=max(1, min(accumulate, 2)), device=on
    )
    chosen = plan(traced, budget, hardware)
    if chosen.smallest_budget_bytes is not None:
        smallest = chosen.smallest_budget_bytes
        raise DoesNotFitError(
            f"budget {budget}: nothing fits; the smallest budget that does is "
            f"{format_bytes(smallest)} ({smallest} bytes); what binds: "
            f"{chosen.binding}",
            chosen,
        )
    return chosen
