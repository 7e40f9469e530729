"""Choices beyond activations, and the searches for the largest size."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memopt.planner import BudgetError, Status
from memopt.planner.planning import estimates, fit, largest_that_fits
from memopt.planner.planning.deciding import estimate
from memopt.planner.values import Category, Trace
from memopt.planner.variants import chunked_loss, offload_state, one_block_at_a_time, release_gradients
from memopt.planner.variants.changes import state_bits
from tests.planner.toy import CPU, GPU, transformer


def held(trace: Trace, category: Category) -> int:
    return sum(s.bytes for s in trace.storages if s.category is category)


def test_changes_change_what_they_say_and_nothing_else() -> None:
    trace = transformer(4, unit=10**8, logits=16)
    eight = state_bits("8bit", 0.25).apply(trace)
    inputs = [s.bytes for block in eight.blocks for s in block.saved_inputs]
    assert inputs == [s.bytes for block in trace.blocks for s in block.saved_inputs]
    assert held(eight, Category.OPTIMIZER) == held(trace, Category.OPTIMIZER) // 4
    logits = [s.bytes for s in chunked_loss().apply(trace).storages if s.category is Category.LOGITS]
    assert sum(logits) == pytest.approx(84 * 2**20, abs=3)
    assert held(chunked_loss().apply(transformer(2)), Category.LOGITS) == held(transformer(2), Category.LOGITS)
    assert held(offload_state().apply(trace), Category.OPTIMIZER) == 0
    assert offload_state().seconds(trace, GPU) == pytest.approx(2 * held(trace, Category.OPTIMIZER) / 2e9)
    released = release_gradients().apply(trace)
    assert held(released, Category.GRADIENTS) == held(trace, Category.GRADIENTS)
    assert released.peak_bytes <= trace.peak_bytes
    one = one_block_at_a_time().apply(trace)
    assert held(one, Category.GRADIENTS) == held(trace, Category.GRADIENTS) // 4
    for changed in (eight, released, one):
        assert held(changed, Category.ACTIVATIONS) == held(trace, Category.ACTIVATIONS)


def test_what_fits_as_it_is_stays_as_it_is() -> None:
    trace = transformer(3)
    found = fit(trace, trace.peak_bytes, CPU)
    assert found.best is not None
    assert found.best.changes == ()
    assert len(found.tried) == 1


def test_a_tight_budget_takes_the_cheapest_combination() -> None:
    trace = transformer(4, unit=10**4, logits=32, optimizer=12, weight=4, flops=10**7)
    found = fit(trace, int(trace.peak_bytes * 0.45), CPU)
    assert found.best is not None
    assert found.best.plan is not None
    assert found.best.plan.status is not Status.INFEASIBLE
    assert found.best.how
    least = min(c.step_seconds for c in found.tried if c.fits)
    assert found.best.step_seconds <= least * 1.01
    near = [c for c in found.tried if c.fits and c.step_seconds <= least * 1.01]
    assert len(found.best.changes) == min(len(c.changes) for c in near)
    peaks = [c.peak_bytes for c in found.pareto]
    seconds = [c.step_seconds for c in found.pareto]
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)


def test_training_itself_is_changed_only_when_nothing_else_fits_and_it_is_allowed() -> None:
    trace = transformer(4, unit=10**4, optimizer=40, weight=4)
    smallest = release_gradients().apply(offload_state().apply(chunked_loss().apply(trace)))
    budget = estimate(smallest, held(trace, Category.WEIGHTS), CPU)[1] - 1
    assert fit(trace, budget, CPU).best is None
    found = fit(trace, budget, CPU, allow_block_coordinate=True)
    assert found.best is not None
    assert found.best.changes_training


def test_states_that_are_small_already_are_not_offered_again() -> None:
    trace = transformer(4, unit=10**4, optimizer=12)
    small = replace(trace, meta={"state_bits": 8.125})
    names = {name for c in estimates(small, int(trace.peak_bytes * 0.5), CPU) for name in c.changes}
    assert "8bit state" not in names
    assert "4bit state" in names


def test_below_the_weights_nothing_is_tried() -> None:
    found = fit(transformer(4, unit=10**4), 10, CPU)
    assert (found.best, found.tried) == (None, ())


def test_an_unreadable_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="'plenty' is not a size"):
        fit(transformer(4), "plenty", CPU)


@pytest.mark.parametrize(("step", "exact"), [(1, True), (8, True), (1, False)])
def test_the_largest_size_fits_and_the_next_does_not(step: int, exact: bool) -> None:
    budget = 2 * 10**6

    def make(size: int) -> Trace:
        return transformer(3, unit=1000 * size)

    size, found = largest_that_fits(make, budget, CPU, step=step, exact=exact)
    assert size % step == 0
    assert found is not None
    assert found.peak_bytes <= budget
    from memopt.planner import plan

    beyond = size + (step if exact else max(1, size // 8))
    assert plan(make(beyond), budget, CPU).status is Status.INFEASIBLE


def test_where_nothing_fits_the_size_is_zero() -> None:
    assert largest_that_fits(lambda size: transformer(3, unit=10**6 * size), 1000, CPU) == (0, None)
    with pytest.raises(ValueError, match="step is 0"):
        largest_that_fits(lambda size: transformer(3), 1000, CPU, step=0)
