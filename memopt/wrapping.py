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
    tiles: int | None = None,
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
        tiles: in how many tiles token-wise parts of blocks (MLPs, as a rule) run; 1: never. By default they do only
            where nothing fits otherwise: with tiles, results are those of the plain step up to rounding, not bitwise.
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
    chosen = plan_within(budget, model, inputs, built, hardware=hardware, loss_fn=loss_fn, tiles=tiles)
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
    tiles: int | None = None,
) -> Plan:
    """Trace one step and plan it; the arguments are those of :func:`wrap`.

    ``accumulate`` is the number of forward and backward passes before the optimizer's step. From the second on the
    gradients of those before are alive all the time and nothing else changes: two passes are traced for any more.

    Raises:
        DoesNotFitError: nothing fits; the message names the smallest budget that would.
        ValueError: see :func:`wrap`.
    """
    from memopt.planner import Trace, format_bytes, plan_in_tiles, trace
    from memopt.planner.planning import AUTOMATIC

    on = "cuda" if any(p.is_cuda for p in model.parameters()) else "cpu"
    passes = max(1, min(accumulate, 2))

    def step(number: int) -> Trace:
        return trace(model, inputs, loss_fn=loss_fn, optimizer=optimizer, accumulate=passes, device=on, tiles=number)

    _, chosen = plan_in_tiles(step, budget, hardware, tiles=AUTOMATIC if tiles is None else (tiles,))
    if chosen.smallest_budget_bytes is not None:
        smallest = chosen.smallest_budget_bytes
        raise DoesNotFitError(
            f"budget {budget}: nothing fits; the smallest budget that does is "
            f"{format_bytes(smallest)} ({smallest} bytes); what binds: "
            f"{chosen.binding}",
            chosen,
        )
    return chosen
