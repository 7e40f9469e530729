"""A plan's predicted peak is the peak that the meter shows when the runtime carries the plan out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.optim import make
from memopt.planner import Action, Plan, Status, Trace, plan, trace, validate
from tests.planner import nets
from tests.planner.test_trace_peak import CASES, TOKENS, Loss
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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: tuple[Tensor, ...],
    loss_fn: Loss | None,
    passes: int = 1,
) -> tuple[int, list[Tensor]]:
    """The peak of the second of two steps, and the trained parameters."""
    for _ in range(2):
        torch.manual_seed(1)
        with memopt.meter(model, optimizer) as meter:
            for _ in range(passes):
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


@pytest.mark.parametrize("passes", [2, 3])
def test_accumulated_gradients_are_in_the_peak_of_a_plan(passes: int) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nets.GPT(dropout=0.1)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    model, built = fresh()
    traced = trace(model, (TOKENS, TOKENS), optimizer=built, accumulate=passes)
    assert [(b.path, b.call) for b in traced.blocks] == [(f"blocks.{n}", 0) for n in range(3)] * passes
    plain_peak, plain = steps(model, built, (TOKENS, TOKENS), None, passes)
    assert traced.peak_bytes == pytest.approx(plain_peak, rel=TOLERANCE)
    found = tightest(traced, (Action.SWAP, Action.RECOMPUTE))
    assert (found.passes, found.status) == (passes, Status.OPTIMAL)
    assert found.peak_bytes < traced.peak_bytes
    assert validate(traced, found, CPU).broken is None
    model, built = fresh()
    with memopt.apply(model, found) as handle:
        peak, trained = steps(model, built, (TOKENS, TOKENS), None, passes)
    assert found.peak_bytes == pytest.approx(peak, rel=TOLERANCE)
    assert handle.report is not None
    assert handle.report.swapped_bytes == pytest.approx(found.swapped_bytes, rel=0.01)
    assert all(torch.equal(a, b) for a, b in zip(plain, trained, strict=True))


def test_what_only_passes_repeat_is_no_block() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nets.GPT()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(tokens, tokens)

    once, twice = (trace(Wrapped(), TOKENS, accumulate=passes) for passes in (1, 2))
    assert {b.path for b in twice.blocks} == {b.path for b in once.blocks} == {f"body.blocks.{n}" for n in range(3)}
