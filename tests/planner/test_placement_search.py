"""The skyline search: native against the Python reference, proofs against brute force, hard planted packings."""

from __future__ import annotations

import random

import pytest

from memopt.planner.placement import find_fault, native, place, skyline
from memopt.planner.placement.instance import reduce
from memopt.planner.placement.methods.search import draw_score, luby, search
from memopt.planner.placement.skyline import Score, Verdict, log2_fixed
from tests.planner.placement_cases import always_full, fits, planted, scattered


def test_native_code_is_in_use_here():
    assert native._library() is not None


@pytest.mark.parametrize("tight", [0.97, 1.0, 1.1])
@pytest.mark.parametrize("seed", range(4))
def test_native_takes_the_same_steps_as_the_reference(seed, tight):
    buffers = planted(seed, 60, 5000) if seed % 2 else scattered(seed, 70)
    draw = random.Random(seed)
    parts = reduce(buffers).parts
    assert parts
    for part in parts:
        capacity = max(1, int(part.max_live * tight))
        compiled = native.attempt_for(part, capacity)
        assert compiled is not skyline.attempt
        ours, theirs = [0] * part.sections, [0] * part.sections
        for _ in range(2):
            score = draw_score(part, draw)
            expected = skyline.attempt(part, capacity, score, theirs, 150)
            assert compiled(part, capacity, score, ours, 150) == expected
            assert ours == theirs


def test_without_a_compiler_the_search_finds_the_same(monkeypatch):
    buffers = planted(3, 50, 3000)
    fast = place(buffers, methods=["search"], node_limit=2000)
    monkeypatch.setattr(native, "_library", lambda: None)
    slow = place(buffers, methods=["search"], node_limit=2000, time_limit=600)
    assert (fast.offsets, fast.peak, fast.method) == (slow.offsets, slow.peak, slow.method)


def test_a_seed_fixes_the_result():
    part = reduce(planted(5, 80, 5000)).parts[0]
    first = search(part, part.max_live, 7, 100_000, 60)
    assert first.verdict is Verdict.FOUND
    assert search(part, part.max_live, 7, 100_000, 60) == first
    assert search(part, part.max_live, 8, 100_000, 60).offsets != first.offsets


@pytest.mark.parametrize(("count", "capacity"), [(12, 12), (20, 20)])
def test_verdicts_agree_with_trying_everything(count, capacity):
    refuted = 0
    for seed in [*range(15), 56, 86, 234]:
        buffers = always_full(seed, count, capacity)
        possible = fits(buffers, capacity)
        verdicts = [search(part, capacity, seed, 10**6, 60).verdict for part in reduce(buffers).parts]
        assert all(v is Verdict.FOUND for v in verdicts) == possible
        assert set(verdicts) <= {Verdict.FOUND, Verdict.EXHAUSTED}
        refuted += not possible
    assert refuted >= 1


def test_no_weight_of_the_score_changes_a_verdict():
    for seed in [19, 23, 34, 56, 86, 1, 2]:
        part = max(reduce(always_full(seed, 20, 20)).parts, key=len)
        draw = random.Random(seed)
        attempt = native.attempt_for(part, part.max_live)
        verdicts = set()
        for _ in range(5):
            score = draw_score(part, draw)
            for crowd, conflict, waste in [(0, 0, 0), (score.crowd, 0, 0), (0, score.conflict, score.waste)]:
                tried = Score(score.fixed, crowd, conflict, waste)
                verdicts.add(attempt(part, part.max_live, tried, [0] * part.sections, 10**6, 60).verdict)
        assert len(verdicts) == 1
        assert verdicts <= {Verdict.FOUND, Verdict.EXHAUSTED}


@pytest.mark.parametrize("cut_time", [0.4, 0.6])
@pytest.mark.parametrize("count", [100, 200, 300])
def test_planted_perfect_packings_are_found(count, cut_time):
    for seed in range(3):
        buffers = planted(seed, count, 2048, cut_time=cut_time)
        answer = place(buffers, capacity=2048, seed=seed, time_limit=60)
        assert (answer.peak, answer.proven) == (2048, True)
        assert find_fault(buffers, answer.offsets, 2048) is None


def test_limits_end_the_search():
    part = reduce(planted(1, 300, 1 << 20)).parts[0]
    assert search(part, part.max_live, 0, 50, 60)[:2] == (Verdict.OUT_OF_NODES, 51)
    assert search(part, part.max_live, 0, 10**9, 0.0).verdict is Verdict.OUT_OF_TIME
    with_clock = native.attempt_for(part, part.max_live)
    score = draw_score(part, random.Random(0))
    for function in (with_clock, skyline.attempt):
        verdict = function(part, part.max_live - 1, score, [0] * part.sections, 10**9, 0.0).verdict
        assert verdict in (Verdict.OUT_OF_TIME, Verdict.EXHAUSTED)


def test_huge_sizes_fall_back_to_python_integers():
    buffers = [type(b)(b.start, b.stop, b.size * (1 << 40) + 1) for b in planted(2, 12, 4096)]
    part = reduce(buffers).parts[0]
    assert native.attempt_for(part, 1 << 60) is skyline.attempt
    answer = place(buffers)
    assert find_fault(buffers, answer.offsets) is None


def test_luby_and_the_logarithm():
    assert [luby(i) for i in range(1, 16)] == [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8]
    assert [log2_fixed(x) >> 15 for x in (1, 2, 3, 4, 1 << 40)] == [0, 2, 3, 4, 80]
