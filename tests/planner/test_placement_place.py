"""place: what it promises for any problem, its limits, and its three outcomes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.planner import Buffer, Placement, place
from memopt.planner.placement import Outcome, find_fault, max_live, placing
from tests.planner.placement_cases import always_full, planted, scattered, training_step

BUFFERS = st.lists(
    st.builds(
        lambda start, length, size: Buffer(start, start + length, size),
        st.integers(-20, 20),
        st.integers(1, 15),
        st.integers(0, 40) | st.integers(0, 10**12),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=120)
@given(buffers=BUFFERS, alignment=st.sampled_from([1, 1, 7, 512]))
def test_every_answer_passes_the_check_and_its_bounds_hold(buffers, alignment):
    answer = place(buffers, alignment=alignment, node_limit=2000)
    assert answer.status is Outcome.PLACED
    assert find_fault(buffers, answer.offsets, answer.peak, alignment) is None
    assert max_live(buffers) <= answer.lower_bound <= answer.peak
    assert answer.proven == (answer.peak == answer.lower_bound)


@settings(deadline=None, max_examples=60)
@given(buffers=BUFFERS, percent=st.integers(0, 150))
def test_a_capacity_is_kept_or_the_outcome_says_why(buffers, percent):
    capacity = max_live(buffers) * percent // 100
    answer = place(buffers, capacity, node_limit=2000)
    if answer.status is Outcome.PLACED:
        assert find_fault(buffers, answer.offsets, capacity) is None
    else:
        assert answer.offsets == ()
        assert (answer.status is Outcome.IMPOSSIBLE) == (answer.lower_bound > capacity)
        assert ("impossible" in answer.reason) == (answer.status is Outcome.IMPOSSIBLE)
        assert ("not found in" in answer.reason) == (answer.status is Outcome.NOT_FOUND)
    if capacity < max_live(buffers):
        assert answer.status is Outcome.IMPOSSIBLE


@pytest.mark.parametrize("layers", [1, 4, 40])
def test_training_steps_are_proven_best_at_once(layers):
    buffers = training_step(layers)
    answer = place(buffers)
    assert answer.proven
    assert answer.peak == max_live(buffers)
    assert answer.seconds < 1


@pytest.mark.parametrize("seed", range(3))
def test_irregular_instances_are_within_one_per_cent_of_max_live(seed):
    buffers = scattered(seed, 200)
    assert place(buffers).peak <= 1.01 * max_live(buffers)


def test_a_gap_above_max_live_is_proven_by_exhaustion():
    buffers = always_full(19, 20, 20)
    answer = place(buffers)
    assert (max_live(buffers), answer.lower_bound, answer.peak, answer.proven) == (20, 21, 21, True)
    assert "exhausted" in answer.reason
    refused = place(buffers, capacity=20)
    assert refused.status is Outcome.IMPOSSIBLE
    assert "exhausted" in refused.reason


def test_a_node_limit_too_small_for_any_proof_ends_the_search():
    buffers = always_full(19, 20, 20)
    answer = place(buffers, node_limit=3, methods=["search"], time_limit=600)
    assert (answer.peak, answer.proven) == (21, False)
    assert answer.seconds < 60


def test_a_hard_goal_leaves_time_for_easier_peaks():
    buffers = planted(1, 300, 1 << 20)
    rough = place(buffers, methods=["greedy"]).peak
    quick = place(buffers, methods=["search"], node_limit=20_000, time_limit=600)
    assert quick.peak < (rough + (1 << 20)) / 2


def test_max_live_is_a_proof_that_names_the_moment():
    answer = place([Buffer(0, 4, 6), Buffer(3, 5, 6)], capacity=11)
    assert answer.status is Outcome.IMPOSSIBLE
    assert "12 bytes are alive at time 3" in answer.reason


def test_limits_end_in_not_found():
    buffers = planted(1, 300, 1 << 20)
    answer = place(buffers, capacity=1 << 20, node_limit=100, methods=["greedy", "search"])
    assert answer.status is Outcome.NOT_FOUND
    assert answer.peak > 1 << 20
    assert answer.lower_bound == 1 << 20
    assert "whether one exists is open" in answer.reason
    quick = place(buffers, capacity=1 << 20, time_limit=0.05, methods=["greedy", "search"])
    assert quick.seconds < 2


def test_aligned_offsets_and_rounded_sizes():
    answer = place([Buffer(0, 2, 100), Buffer(1, 3, 100), Buffer(1, 2, 1)], alignment=512)
    assert sorted(answer.offsets) == [0, 512, 1024]
    assert answer.peak == 1536


@pytest.mark.parametrize("buffers", [[], [Buffer(0, 1, 0)]])
def test_nothing_to_place(buffers):
    for capacity in (None, 0):
        answer = place(buffers, capacity)
        assert (answer.offsets, answer.peak, answer.proven) == ((0,) * len(buffers), 0, True)


def test_an_answer_that_fails_the_last_check_is_refused(monkeypatch):
    monkeypatch.setattr(placing, "find_fault", lambda *_: "buffer 0 and buffer 1 share bytes")
    with pytest.raises(placing.PlacementError, match="share bytes"):
        place([Buffer(0, 1, 1)])


def test_a_faulty_method_is_repaired_and_reported():
    from memopt.planner.placement.instance import reduce
    from memopt.planner.placement.task import Task

    buffers = scattered(0, 40, time=20)
    part = reduce(buffers).parts[0]
    task = Task(part, part.max_live, True, 0, 1, float("inf"))
    task.peak += 10**9  # so that any repaired placement is better
    assert task.offer([0] * len(part), "a method with tolerances")
    assert "faulty" in task.remarks[0]
    lifetimes = [Buffer(a, b, s) for a, b, s in zip(part.low, part.high, part.size, strict=True)]
    assert find_fault(lifetimes, task.offsets, task.peak) is None


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"buffers": [(0, 1, 2)]}, TypeError, r"buffers\[0\] is tuple"),
        ({"capacity": -1}, ValueError, "capacity is -1"),
        ({"capacity": 1.5}, TypeError, "capacity is 1.5"),
        ({"alignment": 0}, ValueError, "alignment is 0, expected 1 or more"),
        ({"time_limit": 0}, ValueError, "time_limit is 0"),
        ({"time_limit": float("nan")}, ValueError, "time_limit is nan"),
        ({"methods": ["luck"]}, ValueError, "methods names 'luck'; known are greedy, search"),
        ({"methods": []}, ValueError, "expected a list out of"),
        ({"methods": "greedy"}, ValueError, "expected a list out of"),
        ({"buffers": [Buffer(0, 1, 1 << 61), Buffer(1, 2, 1 << 61)]}, ValueError, r"less than 2\*\*62"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        place(**{"buffers": [], **arguments})


def test_the_contract_of_placement():
    answer = place([Buffer(0, 3, 4), Buffer(2, 5, 4)], None)
    assert isinstance(answer, Placement)
    assert (answer.peak, answer.lower_bound, answer.proven, answer.gap) == (8, 8, True, 0.0)
    assert answer.method.startswith("greedy")
    assert answer.seconds >= 0
