"""Each method by itself, the exact ones against trying everything, and the registry that finds them."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from memopt.planner import Buffer, place
from memopt.planner.placement import Outcome, all_methods, find_fault, max_live, two_levels
from memopt.planner.placement.instance import reduce
from memopt.planner.placement.methods import bilevel, choose_methods, cpsat, mip
from memopt.planner.placement.task import Task
from tests.planner.placement_cases import always_full, fits, planted, scattered, training_step

GAP = always_full(234, 12, 12)  # needs 13 units where 12 are alive


@pytest.mark.parametrize("name", list(all_methods()))
def test_every_method_gives_a_sound_answer_by_itself(name):
    for buffers in (GAP, scattered(0, 40), training_step(2)):
        answer = place(buffers, methods=[name], time_limit=1.5, node_limit=5000)
        assert answer.status is Outcome.PLACED
        assert find_fault(buffers, answer.offsets, answer.peak) is None
        assert max_live(buffers) <= answer.lower_bound <= answer.peak


@pytest.mark.parametrize("name", ["search", "cpsat", "mip"])
def test_exact_methods_prove_the_gap(name):
    assert fits(GAP, 13)
    assert not fits(GAP, 12)
    best = place(GAP, methods=[name], time_limit=60)
    assert (best.peak, best.lower_bound, best.proven) == (13, 13, True)
    refused = place(GAP, capacity=12, methods=[name], time_limit=60)
    assert refused.status is Outcome.IMPOSSIBLE
    placed = place(GAP, capacity=13, methods=[name], time_limit=60)
    assert find_fault(GAP, placed.offsets, 13) is None


def test_methods_are_found_and_chosen_in_order():
    assert list(all_methods()) == ["greedy", "search", "cpsat", "mip", "bilevel"]
    assert [m.name for m in choose_methods(["search", "greedy"])] == ["greedy", "search"]
    assert [m.name for m in choose_methods(None)] == ["greedy", "search", "cpsat"]


def test_the_bundled_solver_stands_in_where_ortools_is_missing(monkeypatch):
    found = {"ortools": None}
    monkeypatch.setattr(cpsat.importlib.util, "find_spec", lambda name: found.get(name, object()))
    assert [m.name for m in choose_methods(None)] == ["greedy", "search", "mip"]
    with pytest.raises(ValueError, match="method 'cpsat' needs the package ortools: pip install ortools"):
        place(GAP, methods=["cpsat"])
    found["pulp"] = None
    assert [m.name for m in choose_methods(None)] == ["greedy", "search"]


@pytest.mark.parametrize(
    "failure",
    [subprocess.TimeoutExpired("solver", 1), subprocess.CalledProcessError(1, "solver"), OSError("no processes")],
)
def test_a_solver_process_that_fails_leaves_a_remark(monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(cpsat.subprocess, "run", fail)
    answer = place(GAP, methods=["cpsat"])
    assert (answer.status, answer.proven) == (Outcome.PLACED, False)
    assert f"CP-SAT gave no answer ({type(failure).__name__})" in answer.reason


def test_offsets_from_a_solver_are_never_trusted(monkeypatch):
    lies = '{"offsets": [' + ", ".join(["0"] * len(GAP)) + '], "lower": 12}'
    monkeypatch.setattr(
        cpsat.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=lies, stderr="")
    )
    answer = place(GAP, methods=["cpsat"])
    assert find_fault(GAP, answer.offsets, answer.peak) is None
    assert "faulty placement" in answer.reason


def test_the_worker_process_imports_no_solver_here():
    code = "import memopt.planner, sys; sys.exit(any(m in sys.modules for m in ('ortools', 'pulp', 'highspy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_large_problems_are_left_to_the_others():
    part = max(reduce(scattered(0, 300, longest=200)).parts, key=len)
    task = Task(part, part.max_live, True, 0, 1, time.monotonic() + 600)
    before = task.peak
    mip.run(task)
    assert (task.peak, task.lower) == (before, part.max_live)
    assert task.seconds_left() > 590


def layers_of(buffers: list[Buffer]) -> list[tuple[int, int]]:
    end = max(b.stop for b in buffers)
    return [(start, start + 10) for start in range(0, end, 10)]


def test_two_levels_repeat_the_inner_offsets():
    inner = [Buffer(0, 4, 8), Buffer(2, 6, 4), Buffer(5, 9, 8)]
    buffers = [Buffer(b.start + 10 * k, b.stop + 10 * k, b.size) for k in range(3) for b in inner]
    buffers.append(Buffer(0, 30, 100))
    offsets = two_levels(buffers, [(0, 10), (10, 20), (20, 30)])
    assert find_fault(buffers, offsets) is None
    relative = [[offsets[3 * k + i] - offsets[3 * k] for i in range(3)] for k in range(3)]
    assert relative[0] == relative[1] == relative[2]
    assert max(at + b.size for at, b in zip(offsets, buffers, strict=True)) == 112


@pytest.mark.parametrize("buffers", [training_step(6), scattered(3, 60), planted(1, 60, 999)])
def test_two_levels_never_beat_the_flat_placement(buffers):
    offsets = two_levels(buffers, layers_of(buffers))
    peak = max(at + b.size for at, b in zip(offsets, buffers, strict=True))
    assert find_fault(buffers, offsets, peak) is None
    assert peak >= place(buffers).lower_bound


@pytest.mark.parametrize("windows", [[(0, 0)], [(5, 3)], [(0, 5), (4, 9)]])
def test_windows_that_meet_are_refused(windows):
    with pytest.raises(ValueError, match="is empty or meets"):
        two_levels(scattered(0, 5), windows)


def test_windows_are_guessed_from_short_buffers():
    buffers = [Buffer(0, 2, 1), Buffer(1, 3, 1), Buffer(3, 4, 1), Buffer(0, 9, 1), Buffer(7, 9, 1)]
    assert bilevel.windows_of(buffers, 2) == [(0, 3), (3, 4), (7, 9)]
