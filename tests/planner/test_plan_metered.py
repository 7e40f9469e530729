"""A plan's predicted peak is the peak that the meter shows when the runtime carries the plan out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.optim import make
from memopt.planner import Action, Plan, Status, Trace, plan, trace
from tests.planner.test_trace_peak import CASES, Loss
from tests.planner.toy import CPU

TOLERANCE = 0.03  # of the metered peak
BUILT: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "AdamW8bit": lambda model: make("adamw8bit", model.parameters(), lr=1e-3),
}
KINDS = {
    "AdamW": {"recompute": (Action.RECOMPUTE,), "compress": (Action.COMPRESS,)},
    "AdamW8bit": {"all exact ones": (Action.SWAP, Action.RECOMPUTE)},
}


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, ...], loss_fn: Loss | None
) -> tuple[int, list[Tensor]]:
    """The peak of the second of two steps, and the trained parameters."""
    for _ in range(2):
        torch.manual_seed(1)
        with memopt.meter(model, optimizer) as meter:
            output = model(*inputs)
            loss = output if loss_fn is None else loss_fn(output)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss, output
    return meter.peak_bytes, [p.detach().clone() for p in model.parameters()]


def tightest(traced: Trace, actions: tuple[Action, ...]) -> Plan:
    """A plan for 85 % of the plain peak, or for the smallest budget that fits."""
    found = plan(traced, int(traced.peak_bytes * 0.85), CPU, actions=actions, time_limit=10)
    if found.status is Status.INFEASIBLE:
        found = plan(traced, found.smallest_budget_bytes, CPU, actions=actions, time_limit=10)
    return found


@pytest.mark.parametrize("optimizer", BUILT)
@pytest.mark.parametrize("case", CASES)
def test_predicted_peak_is_the_metered_one(case: str, optimizer: str) -> None:
    make_model, inputs, loss_fn = CASES[case]

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = make_model()
        return model, BUILT[optimizer](model)

    model, built = fresh()
    traced = trace(model, inputs, loss_fn=loss_fn, optimizer=built)
    plain_peak, plain = steps(model, built, inputs, loss_fn)
    assert traced.peak_bytes == pytest.approx(plain_peak, rel=TOLERANCE)
    for kind, actions in KINDS[optimizer].items():
        found = tightest(traced, actions)
        model, built = fresh()
        with memopt.apply(model, found):
            peak, trained = steps(model, built, inputs, loss_fn)
        assert found.peak_bytes == pytest.approx(peak, rel=TOLERANCE), kind
        if kind != "compress":
            assert all(torch.equal(a, b) for a, b in zip(plain, trained, strict=True)), kind
