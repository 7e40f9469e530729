"""Pipeline schedules: the closed forms against a run of every job."""

from __future__ import annotations

import pytest

from memopt.planner.pipeline import schedule_table
from memopt.planner.pipeline.events import play_schedule
from memopt.planner.pipeline.schedules import SCHEDULES

SIZES = [(1, 1), (1, 4), (2, 4), (3, 5), (4, 4), (4, 8), (4, 16), (5, 3), (8, 8), (8, 32)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_played_schedules_hold_and_wait_as_the_table_says(size: tuple[int, int]) -> None:
    stages, microbatches = size
    exact = [row for row in schedule_table(stages, microbatches) if row.exact]
    assert {"gpipe", "1f1b"} <= {row.name for row in exact}
    for row in exact:
        run = play_schedule(row.name, stages, microbatches)
        assert run.peak_by_rank == row.peak_by_rank, row.name
        bubble = run.inner_bubble if row.name == "zb-h2" else run.bubble
        assert bubble == pytest.approx(row.bubble), row.name


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_table_is_whole_and_sensible(size: tuple[int, int]) -> None:
    stages, microbatches = size
    rows = {row.name: row for row in schedule_table(stages, microbatches)}
    assert tuple(rows) == SCHEDULES
    for row in rows.values():
        assert len(row.peak_by_rank) == stages
        assert all(0 < peak <= microbatches for peak in row.peak_by_rank), row.name
        assert 0 <= row.bubble < 1
    assert max(rows["v-min"].peak_by_rank) <= max(rows["v-half"].peak_by_rank) <= max(rows["v-zb"].peak_by_rank)
    assert rows["zb-h1"].bubble <= rows["1f1b"].bubble == rows["gpipe"].bubble


V_SIZES = [(2, 8), (4, 16), (6, 32), (8, 32), (12, 64)]


@pytest.mark.parametrize("size", V_SIZES, ids=str)
def test_played_v_schedules_hold_what_was_published(size: tuple[int, int]) -> None:
    stages, microbatches = size
    rows = {row.name: row for row in schedule_table(stages, microbatches) if row.published is not None}
    assert set(rows) == {"v-min", "v-half", "v-zb"}
    for name, row in rows.items():
        peak, bubble = row.published
        beyond = 0.5 if name == "v-half" and stages >= 6 else 0.0
        assert max(row.peak_by_rank) == peak + beyond, name
        if name == "v-zb":  # its published 0 is that of a steady run
            assert row.bubble < 0.4 * (stages - 1) / (microbatches + stages - 1)
            assert play_schedule("v-zb", stages, 4 * microbatches).bubble < 0.35 * row.bubble
        else:
            assert bubble / 3 <= row.bubble <= bubble * 1.05, name


def test_formulas_alone_stand_for_what_takes_long_to_play() -> None:
    rows = {row.name: row for row in schedule_table(64, 256)}
    assert (rows["v-min"].peak_by_rank[0], rows["v-half"].peak_by_rank[0]) == (22, 33)
    assert rows["v-min"].published is None
    assert not rows["v-min"].exact


def test_zero_bubble_halves_need_more_memory() -> None:
    first = play_schedule("zb-h1", 4, 16)
    second = play_schedule("zb-h2", 4, 16)
    assert second.inner_bubble < first.inner_bubble
    assert max(second.peak_by_rank) > max(first.peak_by_rank)


@pytest.mark.parametrize(("stages", "microbatches", "name"), [(0, 4, "stages"), (4, 0, "microbatches")])
def test_sizes_below_one_are_refused(stages: int, microbatches: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        schedule_table(stages, microbatches)


def test_what_cannot_be_played_is_refused() -> None:
    with pytest.raises(ValueError, match="'v-max' is not known; choose gpipe"):
        play_schedule("v-max", 4, 8)
    with pytest.raises(ValueError, match="multiple of the 4 stages"):
        play_schedule("interleaved", 4, 6)
