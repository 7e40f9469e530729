"""Plays pipeline schedules microbatch by microbatch: each rank a list of jobs in order, each job after what it needs.

A forward of a chunk needs the forward before it; a backward (B) needs its own forward and the backward behind it; a
weight part (W) needs its own B. A microbatch's activations on a chunk are there from the start of F to the end of W.
Without a split, B and W are one job of their joint length.
"""

from __future__ import annotations

from dataclasses import dataclass

from memopt.planner.pipeline.building_blocks import SUMS, Job, v_orders, zeropp_orders

PLAYED = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", *SUMS, "zeropp")


@dataclass(frozen=True)
class PipelineRun:
    """What a schedule did: the peak of each rank in activations of a microbatch on a whole stage, and times."""

    peak_by_rank: tuple[float, ...]
    busy_by_rank: tuple[float, ...]
    span_by_rank: tuple[float, ...]
    seconds: float

    @property
    def bubble(self) -> float:
        """The share of the time from start to end in which a device waits, on average."""
        return 1 - sum(self.busy_by_rank) / len(self.busy_by_rank) / self.seconds

    @property
    def inner_bubble(self) -> float:
        """The same between each device's own first and last job: what is left when steps follow on each other."""
        return 1 - sum(self.busy_by_rank) / sum(self.span_by_rank)


def play_schedule(name: str, stages: int, microbatches: int) -> PipelineRun:
    """Play one of ``PLAYED``.

    Raises:
        ValueError: a schedule that is not known, or that these numbers do not allow.
    """
    if name in SUMS:
        return _run(v_orders(name, stages, microbatches), stages, 2, folded=True)
    if name == "zeropp":
        unit = min(microbatches, 2 * stages - 1)
        return _run(zeropp_orders(stages, microbatches, unit), stages, 2)
    if name == "interleaved":
        return _run([_interleaved(r, stages, microbatches) for r in range(stages)], stages, 2)
    if name in ("gpipe", "1f1b", "zb-h1", "zb-h2"):
        return _run([_single(name, r, stages, microbatches) for r in range(stages)], stages, 1)
    raise ValueError(f"schedule {name!r} is not known; choose {', '.join(PLAYED)}")


def _single(name: str, rank: int, p: int, m: int) -> list[Job]:
    """The order of jobs (kind, microbatch, chunk) on a rank with one chunk; "BW" is B and W in one."""
    if name == "gpipe":
        return [("F", i, 0) for i in range(m)] + [("BW", i, 0) for i in range(m)]
    if name == "1f1b":
        ahead = min(p - rank, m)
        jobs: list[Job] = [("F", i, 0) for i in range(ahead)]
        for i in range(m):
            jobs.append(("BW", i, 0))
            if ahead + i < m:
                jobs.append(("F", ahead + i, 0))
        return jobs
    # W is put off so far that every rank holds as many microbatches as the first one does.
    ahead, delay = (min(p - rank, m), rank) if name == "zb-h1" else (min(2 * (p - rank) - 1, m), 2 * rank)
    jobs = [("F", i, 0) for i in range(ahead)]
    for i in range(m):
        jobs.append(("B", i, 0))
        if i >= delay:
            jobs.append(("W", i - delay, 0))
        if ahead + i < m:
            jobs.append(("F", ahead + i, 0))
    return jobs + [("W", i, 0) for i in range(max(0, m - delay), m)]


def _interleaved(rank: int, p: int, m: int, v: int = 2) -> list[Job]:
    """Megatron's order: groups of p microbatches through each chunk in turn; m must be a multiple of p."""
    if m % p:
        raise ValueError(f"microbatches is {m}; interleaving takes a multiple of the {p} stages")
    order = [(group * p + i, chunk) for group in range(m // p) for chunk in range(v) for i in range(p)]
    back = [(group * p + i, v - 1 - chunk) for group in range(m // p) for chunk in range(v) for i in range(p)]
    ahead = min(2 * (p - rank - 1) + (v - 1) * p + 1, m * v)
    jobs: list[Job] = [("F", *order[n]) for n in range(ahead)]
    for n in range(m * v):
        jobs.append(("BW", *back[n]))
        if ahead + n < m * v:
            jobs.append(("F", *order[ahead + n]))
    return jobs


def _run(orders: list[list[Job]], p: int, v: int, folded: bool = False) -> PipelineRun:
    """Every rank does its jobs in order, each as soon as what it needs is done.

    Chunk c of rank r is stage cp + r, or, ``folded``, in odd chunks cp + p - 1 - r.
    """
    length = {"F": 1 / v, "B": 1 / v, "W": 1 / v, "BW": 2 / v}
    ends: dict[tuple[str, int, int], float] = {}
    clock, place = [0.0] * p, [0] * p
    events: list[list[tuple[float, int, float]]] = [[] for _ in range(p)]
    first, busy = [-1.0] * p, [0.0] * p
    while any(place[r] < len(orders[r]) for r in range(p)):
        moved = False
        for r in range(p):
            while place[r] < len(orders[r]):
                kind, i, chunk = orders[r][place[r]]
                stage = chunk * p + (p - 1 - r if folded and chunk % 2 else r)
                ready = _ready(kind, i, stage, p * v, ends)
                if ready is None:
                    break
                start = max(clock[r], ready)
                end = start + length[kind]
                first[r] = start if first[r] < 0 else first[r]
                clock[r], busy[r] = end, busy[r] + length[kind]
                for part in ("B", "W") if kind == "BW" else (kind,):
                    ends[part, i, stage] = end
                if kind == "F":
                    events[r].append((start, 1, 1 / v))
                elif kind in ("W", "BW"):
                    events[r].append((end, 0, -1 / v))
                place[r] += 1
                moved = True
        if not moved:
            raise ValueError("the schedule waits for itself")
    return PipelineRun(
        tuple(_peak(e) for e in events),
        tuple(busy),
        tuple(c - f for c, f in zip(clock, first, strict=True)),
        max(clock),
    )


def _ready(kind: str, i: int, stage: int, count: int, ends: dict[tuple[str, int, int], float]) -> float | None:
    """When a job's needs are done; None while one has not been placed."""
    if kind == "F":
        needs = [("F", i, stage - 1)] if stage else []
    elif kind == "W":
        needs = [("B", i, stage)]
    else:
        needs = [("F", i, stage)] + ([("B", i, stage + 1)] if stage < count - 1 else [])
    if any(need not in ends for need in needs):
        return None
    return max((ends[need] for need in needs), default=0.0)


def _peak(events: list[tuple[float, int, float]]) -> float:
    held = most = 0.0
    for _, _, change in sorted((round(time, 9), order, change) for time, order, change in events):
        held += change
        most = max(most, held)
    return round(most, 9)
