"""Pipeline schedules: the closed forms against a run of every job."""

from __future__ import annotations

import pytest

from memopt.planner.pipeline import SCHEDULES, schedule_table
from memopt.planner.pipeline_events import play_schedule

SIZES = [(1, 1), (1, 4), (2, 4), (3, 5), (4, 4), (4, 8), (4, 16), (5, 3), (8, 8), (8, 32)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_played_schedules_hold_and_wait_as_the_table_says(size: tuple[int, int]) -> None:
    stages, microbatches = size
    for row in schedule_table(stages, microbatches):
        if row.exact:
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


def test_published_peaks_of_the_v_schedules() -> None:
    rows = {row.name: row.peak_by_rank[0] for row in schedule_table(8, 64)}
    assert (rows["v-min"], rows["v-half"], rows["v-zb"], rows["zb-h2"]) == (4, 5, 8, 15)


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
    with pytest.raises(ValueError, match="'v-min' is not played; choose gpipe"):
        play_schedule("v-min", 4, 8)
    with pytest.raises(ValueError, match="multiple of the 4 stages"):
        play_schedule("interleaved", 4, 6)
