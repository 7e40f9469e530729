"""What a rank does in DeepSpeed's end-to-end tests: real text through the example's engine, with and without a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import memopt
from examples import deepspeed_zero
from examples.deepspeed_zero import headroom_bytes
from memopt.planner import Plan
from tests.integrations import real_text

SAVED, STEPS = 4, 8
PLANNED_STEPS = 3
SHARE = 0.65  # of the step's peak


def budgeted(stage: int) -> tuple[Plan, int]:
    """A plan for a share of one rank's step, DeepSpeed's own bytes on top of it, and that budget."""
    model = real_text.model()
    headroom = headroom_bytes(model, stage)
    _, budget = real_text.planned(stage, SHARE)
    inputs = real_text.data(range(1), 0)[0]
    return deepspeed_zero.planned(model, inputs, stage, budget + headroom), budget + headroom


def engine(stage: int, plan: Plan | None) -> Any:
    return deepspeed_zero.engine(real_text.model(), stage, real_text.PER_RANK, real_text.LR, plan)


def train(module: Any, rank: int, steps: range) -> list[float]:
    losses = []
    for inputs in real_text.data(steps, rank):
        loss = module(*inputs)
        module.backward(loss)
        module.step()
        losses.append(loss.item())
    return losses


def with_and_without(rank: int, stage: int) -> dict[str, Any]:
    """A few steps under a plan, and without one: losses, parameters and the metered peak of the last."""
    import deepspeed

    plan, budget = budgeted(stage)
    found: dict[str, Any] = {"budget": budget, "status": plan.status.value}
    for name, applied in (("plain", None), ("plan", plan)):
        module = engine(stage, applied)
        losses = train(module, rank, range(PLANNED_STEPS - 1))
        with memopt.meter((), ()) as meter:
            losses += train(module, rank, range(PLANNED_STEPS - 1, PLANNED_STEPS))
        parameters = list(module.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
            whole = [parameter.detach().clone() for parameter in parameters]
        found[name] = {"losses": losses, "parameters": whole, "peak_bytes": meter.peak_bytes}
    return found


def zero_3(rank: int, folder: str) -> dict[str, Any]:
    """Losses under a plan; saved in the middle, loaded into a new engine, and continued."""
    plan, _ = budgeted(3)
    module = engine(3, plan)
    losses = train(module, rank, range(SAVED))
    module.save_checkpoint(f"{folder}/text", tag="here")
    losses += train(module, rank, range(SAVED, STEPS))
    again = engine(3, plan)
    again.load_checkpoint(f"{folder}/text", tag="here")
    return {"losses": losses, "resumed": train(again, rank, range(SAVED, STEPS))}


def example(folder: str) -> None:
    """The example, and again, which goes on where it was."""
    for stage, steps in ((2, 2), (3, 2), (3, 3)):
        deepspeed_zero.main(
            Path(folder) / f"example-{stage}", stage=stage, steps=steps, batch=2, width=64, budget="9MiB"
        )
