"""The policy program: solver faults, nonsense answers, baselines, sweeps, identical blocks."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pulp
import pytest

from memopt.planner import Action, SolverError, Status, Trace, plan
from memopt.planner.baselines import BASELINES, baseline
from memopt.planner.baselines.memo import alpha
from memopt.planner.devices import Rates
from memopt.planner.planning import deciding
from memopt.planner.policy import smallest_peak, solve
from memopt.planner.problem import Problem, build
from memopt.planner.validation import simulate
from tests.planner.toy import CPU, GPU, transformer

EXACT = (Action.SWAP, Action.RECOMPUTE)


@pytest.mark.parametrize("rates", [CPU, GPU], ids=lambda r: r.name)
def test_twenty_budgets_are_never_exceeded_and_more_is_never_slower(rates: Rates) -> None:
    trace = transformer(4, unit=10**5, flops=10**8)
    smallest = plan(trace, int(trace.peak_bytes * 0.4), rates).peak_bytes
    seconds = []
    for n in range(20):
        budget = smallest + (trace.peak_bytes - smallest) * n // 19
        found = plan(trace, budget, rates)
        assert found.status is not Status.INFEASIBLE
        assert found.peak_bytes <= budget
        seconds.append(found.step_seconds)
    slack = 1e-3 * seconds[-1]
    assert all(tighter >= looser - slack for tighter, looser in pairwise(seconds))


@pytest.mark.parametrize("rates", [CPU, GPU], ids=lambda r: r.name)
@pytest.mark.parametrize("name", BASELINES)
def test_no_baseline_is_faster_at_its_own_peak(name: str, rates: Rates) -> None:
    trace = transformer(5, unit=10**5, flops=10**8)
    _, theirs = baseline(name, trace, int(trace.peak_bytes * 0.7), rates)
    assert theirs.broken is None
    ours = plan(trace, theirs.peak_bytes, rates)
    assert ours.peak_bytes <= theirs.peak_bytes
    assert ours.step_seconds <= theirs.step_seconds * (1 + 1e-9)


def test_unknown_baselines_name_the_choices() -> None:
    with pytest.raises(ValueError, match="'magic' is unknown; choose memo, protrain, recompute_everything"):
        baseline("magic", transformer(2), "1GiB", CPU)


def test_memos_alpha_is_the_smaller_of_link_and_host() -> None:
    trace = transformer(6, unit=1000, flops=10**6)
    block = trace.blocks[0]
    compute = sum(
        GPU.seconds(op.flops, op.bytes_read + op.bytes_written) for op in trace.ops[block.forward[0] : block.forward[1]]
    )
    slow = Rates("slow", 1e12, 1e11, 8000 / compute, 8000 / compute, 10**12, "host", overlap=True)
    assert alpha(trace, slow) == pytest.approx((8000 - 2000) / 14000)  # the input and attention leave whole
    assert alpha(trace, GPU) == 1.0
    small = Rates("small", 1e12, 1e11, 1e12, 1e12, 4 * 3000, "host", overlap=True)
    assert alpha(trace, small) == pytest.approx((3000 - 2000) / 14000)


def memos_problem(trace: Trace, rates: Rates) -> Problem:
    """What MEMO assumes: memory for nothing but the last two layers, input and attention swapped, the rest divided.

    Copies begin when a layer's forward ends, and nothing is replayed for more than one storage.
    """
    problem = build(trace, rates, EXACT)
    blocks = []
    for block in problem.blocks:
        last = block.block >= len(problem.blocks) - 2
        items = []
        for item in block.items:
            saved = trace.blocks[block.block].saved[item.index : item.index + 1]
            whole = not saved or trace.ops[saved[0].producer].name == "attention"
            allowed = {Action.KEEP} if last else {Action.SWAP} if whole else {Action.SWAP, Action.RECOMPUTE}
            choices = [
                replace(c, swap_lead_seconds=0.0) for c in item.choices if c.action in allowed and c.fraction == 1
            ]
            items.append(replace(item, choices=tuple(choices), token_wise=not whole))
        blocks.append(replace(block, items=tuple(items)))
    return replace(problem, blocks=tuple(blocks), positions=())


@pytest.mark.parametrize("room", [10**12, 4 * 6000], ids=["link", "host"])
def test_memos_closed_form_is_the_linear_program(room: int) -> None:
    trace = transformer(6, unit=1000, flops=10**9)
    block = trace.blocks[0]
    compute = sum(
        GPU.seconds(op.flops, op.bytes_read + op.bytes_written) for op in trace.ops[block.forward[0] : block.forward[1]]
    )
    link = 9000 / compute
    rates = Rates("slow", GPU.flops_per_second, GPU.memory_bytes_per_second, link, link, room, "host", overlap=True)
    expected = alpha(trace, rates)
    assert expected == pytest.approx((min(9000, room / 4) - 2000) / 14000)
    problem = memos_problem(trace, rates)
    solution = solve(problem, tiled=True, gap=1e-8)  # seconds before traffic, as in the closed form
    swapped = sum(
        c.swap_bytes * solution.shares.get(c.variable, 0) for b in problem.blocks for i in b.items for c in i.choices
    )
    assert (swapped / 4 - 2000) / 14000 == pytest.approx(expected, rel=1e-5)


def test_divided_rows_are_never_slower_than_whole_storages() -> None:
    trace = transformer(4, unit=10**5, flops=10**8)
    problem = build(trace, CPU, EXACT)
    for budget in (0.75, 0.85):
        within = problem.within(int(trace.peak_bytes * budget))
        whole, divided = solve(within), solve(within, tiled=True)
        assert divided.seconds <= whole.seconds * (1 + 1e-3)


def test_the_program_counts_what_the_simulation_counts() -> None:
    trace = transformer(4, unit=1000)
    problem = build(trace, CPU, EXACT)
    peak, solution = smallest_peak(problem)
    assert solution.status is not Status.INFEASIBLE
    within = solve(problem.within(peak))
    assert within.status is not Status.INFEASIBLE
    assert peak <= trace.peak_bytes
    assert solve(problem.within(peak // 2)).status is Status.INFEASIBLE


def test_eighty_layers_are_solved_quickly() -> None:
    trace = transformer(80, unit=10**6, flops=10**9)
    problem = build(trace, GPU, EXACT)
    began = time.process_time()
    solution = solve(problem.within(int(trace.peak_bytes * 0.5)), time_limit=15)
    assert solution.status is not Status.INFEASIBLE
    assert time.process_time() - began < 15


def test_a_missing_solver_is_named() -> None:
    trace = transformer(3)
    budget = int(trace.peak_bytes * 0.8)
    with pytest.raises(SolverError, match="solver 'abacus' is not known"):
        plan(trace, budget, CPU, solver="abacus")
    with pytest.raises(SolverError, match="'gurobi' cannot be run here: install it, or take solver='cbc'"):
        plan(trace, budget, CPU, solver="gurobi")


@pytest.mark.parametrize("limit", [0, -1.0, float("inf"), float("nan"), True, "10"])
def test_what_is_no_time_limit_is_refused(limit: Any) -> None:
    trace = transformer(2)
    with pytest.raises(ValueError, match="time_limit must be a positive, finite number of seconds"):
        plan(trace, int(trace.peak_bytes * 0.8), CPU, time_limit=limit)


def test_a_solver_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", str(tmp_path / "gone"))
    trace = transformer(3)
    with pytest.raises(SolverError, match="cbc"):
        plan(trace, int(trace.peak_bytes * 0.8), CPU)


def broken_solver(tmp_path: Path, script: str) -> Any:
    path = tmp_path / "cbc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", ["exit 9", "kill -SEGV $$", "echo nonsense; exit 0"])
def test_a_solver_that_crashes_or_says_nothing_is_an_error_not_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", broken_solver(tmp_path, script))
    trace = transformer(3)
    with pytest.raises(SolverError, match="cbc"):
        plan(trace, int(trace.peak_bytes * 0.8), CPU)


def test_nonsense_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Any, lp: Any, **_: Any) -> int:
        for variable in lp.variables():
            variable.varValue, variable.dj = 0.37, 0.0
        lp.assignStatus(pulp.LpStatusOptimal, pulp.LpSolutionOptimal)
        return int(pulp.LpStatusOptimal)

    monkeypatch.setattr(pulp.PULP_CBC_CMD, "actualSolve", answer)
    trace = transformer(3)
    with pytest.raises(SolverError, match="answered no integers"):
        plan(trace, int(trace.peak_bytes * 0.8), CPU)


@pytest.mark.parametrize(
    ("status", "found", "message"),
    [
        (pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible, "no peak is possible"),
        (pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound, "found nothing in time .*longer time_limit"),
    ],
)
def test_a_solver_that_gives_up_is_an_error_not_a_plan(
    monkeypatch: pytest.MonkeyPatch, status: int, found: int, message: str
) -> None:
    def give_up(self: Any, lp: Any, **_: Any) -> int:
        lp.assignStatus(status, found)
        return status

    monkeypatch.setattr(pulp.PULP_CBC_CMD, "actualSolve", give_up)
    trace = transformer(3)
    with pytest.raises(SolverError, match=message):
        plan(trace, int(trace.peak_bytes * 0.8), CPU)


def test_a_plan_that_breaks_a_rule_is_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever went wrong before: here sizes change on the way from the solver to the plan."""
    parts = deciding._parts
    monkeypatch.setattr(
        deciding, "_parts", lambda saved, taken: [replace(one, bytes=one.bytes + 1) for one in parts(saved, taken)]
    )
    trace = transformer(3)
    with pytest.raises(SolverError, match=r"breaks a rule and is withheld: block .* has \d+ bytes, not \d+"):
        plan(trace, int(trace.peak_bytes * 0.8), CPU)


def test_a_policy_that_overshoots_is_caught_by_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: Any, lp: Any, **_: Any) -> int:
        for variable in lp.variables():
            variable.varValue, variable.dj = 0.0, 0.0
        problem = build(trace, CPU, EXACT)
        kept = {f"x{item.choices[0].variable}" for block in problem.blocks for item in block.items}
        for variable in lp.variables():
            variable.varValue = 1.0 if variable.name in kept else 0.0
        lp.assignStatus(pulp.LpStatusOptimal, pulp.LpSolutionOptimal)
        return int(pulp.LpStatusOptimal)

    monkeypatch.setattr(pulp.PULP_CBC_CMD, "actualSolve", keep)
    trace = transformer(3)
    budget = int(trace.peak_bytes * 0.8)
    assert simulate(trace, (), CPU).peak_bytes > budget
    found = plan(trace, budget, CPU)
    assert found.status is Status.INFEASIBLE
    assert found.peak_bytes > budget
