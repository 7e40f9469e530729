"""``plan`` on traces written by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from memopt.planner import Action, BlockPlan, BudgetError, Status, StorageAction, Trace, plan, validate
from memopt.planner.devices import Rates
from memopt.planner.validation import simulate
from tests.planner.toy import CPU, GPU, transformer


@pytest.mark.parametrize("rates", [CPU, GPU], ids=lambda r: r.name)
@pytest.mark.parametrize("share", [0.95, 0.8, 0.65, 0.55])
def test_plans_fit_pass_validation_and_add_up(rates: Rates, share: float) -> None:
    trace = transformer(6, unit=10**6, flops=10**9)
    budget = int(trace.peak_bytes * share)
    found = plan(trace, budget, rates)
    assert found.status is not Status.INFEASIBLE
    assert found.peak_bytes <= budget
    assert validate(trace, found, rates).broken is None
    assert sum(found.by_category.values()) == found.peak_bytes
    assert found.baseline_peak_bytes == trace.peak_bytes
    parts = found.compute_seconds + found.recompute_seconds + found.stall_seconds + found.compression_seconds
    assert found.step_seconds == pytest.approx(parts)
    after = found.timeline_after
    assert max(map(sum, zip(*after.by_category.values(), strict=True))) == found.peak_bytes
    assert list(after.seconds) == sorted(after.seconds)


def test_no_budget_or_enough_keeps_everything() -> None:
    trace = transformer(3)
    for budget in (None, trace.peak_bytes):
        found = plan(trace, budget, CPU)
        assert found.status is Status.OPTIMAL
        assert found.peak_bytes == trace.peak_bytes
        assert {a.action for b in found.blocks for a in b.actions} == {Action.KEEP}
        assert found.step_seconds == found.compute_seconds


def every_plan(trace: Trace, actions: tuple[Action, ...]) -> list[tuple[BlockPlan, ...]]:
    fates = [[(b, s, a) for a in actions] for b in trace.blocks for s in b.saved]
    found = []
    for combination in itertools.product(*fates):
        plans = []
        for block in trace.blocks:
            mine = tuple(StorageAction(s.index, s.bytes, a) for b, s, a in combination if b is block)
            plans.append(BlockPlan(block.path, block.call, block.signature, mine))
        found.append(tuple(plans))
    return found


def test_one_block_is_solved_as_well_as_by_trying_everything() -> None:
    trace = transformer(1, unit=10**6, flops=10**9, logits=16)
    every = [simulate(trace, plans, CPU) for plans in every_plan(trace, (Action.KEEP, Action.SWAP, Action.RECOMPUTE))]
    smallest = min(played.peak_bytes for played in every)
    assert smallest < trace.peak_bytes
    for budget in [*sorted({played.peak_bytes for played in every})[::3], trace.peak_bytes - 1]:
        found = plan(trace, budget, CPU)
        best = min(played.step_seconds for played in every if played.peak_bytes <= budget)
        assert found.peak_bytes <= budget
        assert found.step_seconds <= best + 2e-4 * found.compute_seconds, budget


@pytest.mark.parametrize("rates", [CPU, GPU], ids=lambda r: r.name)
def test_nothing_fits_is_an_answer_with_the_smallest_budget_that_would(rates: Rates) -> None:
    trace = transformer(4)
    found = plan(trace, int(trace.peak_bytes * 0.3), rates)
    assert found.status is Status.INFEASIBLE
    assert found.blocks == ()
    assert found.smallest_budget_bytes is not None
    assert found.binding.startswith("memory at ")
    again = plan(trace, found.smallest_budget_bytes, rates)
    assert again.status is not Status.INFEASIBLE
    assert again.peak_bytes <= found.smallest_budget_bytes


def test_a_budget_below_the_weights_is_an_answer_too() -> None:
    trace = transformer(4, unit=2**20)
    found = plan(trace, "7MiB", CPU)
    assert found.status is Status.INFEASIBLE
    assert found.binding.startswith("the weights alone, 8.0 MiB, are above the budget; memory at ")
    assert found.smallest_budget_bytes == plan(trace, "9MiB", CPU).smallest_budget_bytes
    assert plan(trace, found.smallest_budget_bytes, CPU).status is not Status.INFEASIBLE


def test_unreadable_budgets_are_refused() -> None:
    trace = transformer(4)
    with pytest.raises(BudgetError, match="'plenty' is not a size"):
        plan(trace, "plenty", CPU)


def test_unknown_actions_and_hardware_name_the_choices() -> None:
    trace = transformer(1)
    with pytest.raises(ValueError, match="actions has 'forget'; the actions are keep, swap, recompute, compress"):
        plan(trace, None, CPU, actions=["keep", "forget"])
    with pytest.raises(ValueError, match="unknown hardware 'abacus'; choose"):
        plan(trace, None, "abacus")


def test_only_the_allowed_actions_are_taken() -> None:
    trace = transformer(5)
    for name in ("swap", "recompute", "compress"):
        found = plan(trace, int(trace.peak_bytes * 0.9), CPU, actions=[name])
        taken = {a.action.value for b in found.blocks for a in b.actions}
        assert taken == {"keep", name}


def test_without_a_tier_nothing_is_swapped() -> None:
    trace = transformer(4)
    found = plan(trace, int(trace.peak_bytes * 0.8), replace(CPU, tier="none"))
    assert {a.action for b in found.blocks for a in b.actions} == {Action.KEEP, Action.RECOMPUTE}


def test_host_room_limits_swapping() -> None:
    trace = transformer(6, flops=10**9)
    budget = int(trace.peak_bytes * 0.7)
    free = plan(trace, budget, GPU)
    assert free.recompute_seconds == pytest.approx(0, abs=1e-6)
    tight = plan(trace, budget, replace(GPU, host_bytes=free.host_bytes // 2))
    assert tight.peak_bytes <= budget
    assert tight.host_bytes <= free.host_bytes // 2
    assert tight.recompute_seconds > free.recompute_seconds


def test_a_slow_link_is_not_overloaded() -> None:
    trace = transformer(4, unit=10**6, flops=10**8)
    budget = int(trace.peak_bytes * 0.7)
    fast = plan(trace, budget, GPU, actions=["swap"])
    slow = plan(
        trace, budget, replace(GPU, swap_out_bytes_per_second=2e8, swap_in_bytes_per_second=2e8), actions=["swap"]
    )
    assert slow.stall_seconds > fast.stall_seconds
    both = plan(trace, budget, replace(GPU, swap_out_bytes_per_second=2e8, swap_in_bytes_per_second=2e8))
    assert both.step_seconds < slow.step_seconds
