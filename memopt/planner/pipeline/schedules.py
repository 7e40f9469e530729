"""Peak activation memory and bubble of pipeline schedules, in closed form.

Memory is in units of the activations of one microbatch on one whole stage, per device; times count T_F = T_B = T_W = 1
(forward, backward to the input, backward to the weights) for a whole stage, so that a microbatch takes 3 on each. The
bubble is the share of a device's time in which it waits. p stages, m microbatches.

| schedule    | peak of rank r                    | bubble                      | source |
|-------------|-----------------------------------|-----------------------------|--------|
| GPipe       | m                                 | (p-1) / (m+p-1)             | Huang et al. 2019 |
| 1F1B        | min(p-r, m)                       | (p-1) / (m+p-1)             | PipeDream-Flush |
| interleaved | (min(2(p-r-1) + (v-1)p + 1, mv)) / v | (p-1) / (vm+p-1)         | Narayanan et al. 2021 |
| ZB-H1       | min(p, m), all ranks              | (p-1) / (3m+p-1)            | Qi et al. 2023, section 2 |
| ZB-H2       | min(2p-1, m), all ranks           | 0 in a steady run           | Qi et al. 2023, section 2 |
| V-Min       | floor((p+4)/3), all ranks         | about 2p / 3m of the work   | Qi et al. 2024, table 2 |
| V-Half      | floor((p+2)/2), all ranks         | about p / 2m of the work    | Qi et al. 2024, table 2 |
| V-ZB        | p, all ranks                      | 0 in a steady run           | Qi et al. 2024, table 2 |
| ZeroPP      | min(U, m), all ranks              | (p-1) / (3vm+p-1)           | played; Tang et al. 2024 |

ZeroPP works in units of U = min(m, 2p-1) microbatches. All are played by ``pipeline_events``. The first five and ZeroPP
agree with these formulas exactly. The V schedules, rebuilt from their rules, hold what was published (V-Half half a
microbatch more where p is even and at least 6), and wait a little less than the published approximations for V-Min and
V-Half; V-ZB's published 0 leaves out the first and last microbatches, in which it does wait. The table shows what the
play showed, with the published figures beside it where they differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from memopt.planner.pipeline.building_blocks import SUMS
from memopt.planner.pipeline.events import play_schedule

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "v-min", "v-half", "v-zb", "zeropp")
CHUNKS = 2
LARGEST_PLAYED = 8192  # stages x microbatches: a second or two


@dataclass(frozen=True)
class ScheduleRow:
    """One schedule by its ``name``: what it holds and what it wastes.

    ``peak_by_rank`` is in activations of a microbatch, ``bubble`` the share of a device's time.

    ``exact`` says that formula and event simulation agree. Where they do not, the figures are the simulation's, and
    ``published`` holds the formula's peak and bubble; sizes too large to play have the formula's alone.
    """

    name: str
    peak_by_rank: tuple[float, ...]
    bubble: float
    exact: bool
    published: tuple[float, float] | None = None


def schedule_table(stages: int, microbatches: int) -> tuple[ScheduleRow, ...]:
    """Every schedule for p stages and m microbatches, in the order of ``SCHEDULES``.

    Args:
        stages: p, devices along the pipeline.
        microbatches: m of a step.

    Raises:
        ValueError: fewer than one stage or microbatch.
    """
    if stages < 1:
        raise ValueError(f"stages is {stages}; it must be at least 1")
    if microbatches < 1:
        raise ValueError(f"microbatches is {microbatches}; it must be at least 1")
    p, m, v = stages, microbatches, CHUNKS
    ranks = range(p)
    plain = (p - 1) / (m + p - 1)
    unit = min(m, 2 * p - 1)

    def level(size: int) -> tuple[float, ...]:
        return tuple(float(min(size, m)) for _ in ranks)

    rows = (
        ScheduleRow("gpipe", tuple(float(m) for _ in ranks), plain, True),
        ScheduleRow("1f1b", tuple(float(min(p - r, m)) for r in ranks), plain, True),
        ScheduleRow(
            "interleaved",
            tuple(min(2 * (p - r - 1) + (v - 1) * p + 1, m * v) / v for r in ranks),
            (p - 1) / (v * m + p - 1),
            m % p == 0,
        ),
        ScheduleRow("zb-h1", level(p), (p - 1) / (3 * m + p - 1), m >= p),
        ScheduleRow("zb-h2", level(2 * p - 1), 0.0, m >= 2 * p - 1),
        ScheduleRow("v-min", level((p + 4) // 3), _share(2 * p / (3 * m)), False),
        ScheduleRow("v-half", level((p + 2) // 2), _share(p / (2 * m)), False),
        ScheduleRow("v-zb", level(p), 0.0, False),
        ScheduleRow("zeropp", level(unit), (p - 1) / (3 * v * m + p - 1), m >= p),
    )
    return tuple(_played(row, p, m) for row in rows)


def _played(row: ScheduleRow, p: int, m: int) -> ScheduleRow:
    """A V schedule's row with what the event simulation shows."""
    if row.name not in SUMS or p * m > LARGEST_PLAYED:
        return row
    run = play_schedule(row.name, p, m)
    return ScheduleRow(row.name, run.peak_by_rank, run.bubble, False, (max(row.peak_by_rank), row.bubble))


def _share(waiting: float) -> float:
    """Waiting over all time, from waiting over work."""
    return waiting / (1 + waiting)
