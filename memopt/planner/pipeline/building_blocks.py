"""V-shaped pipeline schedules as repeated building blocks (Qi et al. 2024, "Pipeline Parallelism with Controllable
Memory", 2405.15362), and ZeroPP's units (Tang et al. 2024, 2402.03791).

In a V each device has two chunks: device r the stages r and 2p-1-r, so that a microbatch goes down the devices and up
again. A building block says when a microbatch's six jobs on each device run (F, B and W of both chunks, one unit of
time each); microbatch i runs it 6i units later. Along the devices F of the first chunk advances by f0 units from one to
the next, F of the second by f1 on the way back, then B by b1 and b0. A device's two lifespans from F to W add up to
about (f0 + f1 + b1 + b0) p units whatever the device, so that it holds a sixth of that in chunks: the sum of the four
is 4 for V-Min (p/3 microbatches), 6 for V-Half (p/2), 12 for V-ZB (p).

The offsets and the waits at the three turns are those with the least waits for which no two jobs of a device fall
on one unit modulo 6; W takes the next free unit after its B. Jobs then run in that order, each as soon as it can.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import product
from math import inf

Job = tuple[str, int, int]
SUMS = {"v-min": 4, "v-half": 6, "v-zb": 12}
PERIOD = 6
_WAITS = range(1, PERIOD + 1)


def v_orders(name: str, p: int, m: int) -> list[list[Job]]:
    """Each device's jobs (kind, microbatch, chunk) in order, for p devices and m microbatches."""
    block = _block(SUMS[name], p)
    orders = []
    for device in block:
        timed = [(start + PERIOD * i, kind, i, chunk) for kind, chunk, start in device for i in range(m)]
        orders.append([(kind, i, chunk) for _, kind, i, chunk in sorted(timed)])
    return orders


@cache
def _block(total: int, p: int) -> tuple[tuple[tuple[str, int, int], ...], ...]:
    """For each device (kind, chunk, start) of its six jobs."""
    offsets = [four for four in product(range(1, total), repeat=4) if sum(four) == total]
    if total == SUMS["v-zb"]:
        offsets = [four for four in offsets if sorted(four) == [2, 2, 4, 4]]
    waits = sorted(product(_WAITS, repeat=3), key=lambda three: (sum(three), three))
    best: tuple[int, list[tuple[int, int, int, int]]] | None = None
    for three in waits:
        for four in offsets:
            starts = [_starts(four, three, r, p) for r in range(p)]
            clashes = sum(4 - len({start % PERIOD for start in device}) for device in starts)
            if best is None or clashes < best[0]:
                best = clashes, starts
            if not clashes:
                return tuple(_with_weights(device) for device in starts)
    assert best is not None
    return tuple(_with_weights(device) for device in best[1])


def _starts(four: tuple[int, ...], three: tuple[int, ...], r: int, p: int) -> tuple[int, int, int, int]:
    """When F of chunk 0, F of chunk 1, B of chunk 1 and B of chunk 0 begin on device r."""
    f0, f1, b1, b0 = four
    first = (p - 1) * f0 + three[0]  # F of chunk 1 on the last device
    second = first + (p - 1) * f1 + three[1]  # B of chunk 1 on the first
    third = second + (p - 1) * b1 + three[2]  # B of chunk 0 on the last
    return r * f0, first + (p - 1 - r) * f1, second + r * b1, third + (p - 1 - r) * b0


def _with_weights(starts: tuple[int, int, int, int]) -> tuple[tuple[str, int, int], ...]:
    jobs = list(zip(("F", "F", "B", "B"), (0, 1, 1, 0), starts, strict=True))
    taken = {start % PERIOD for start in starts}
    for chunk, begin in ((1, starts[2]), (0, starts[3])):
        start = begin + 1
        while start % PERIOD in taken and len(taken) < PERIOD:
            start += 1
        taken.add(start % PERIOD)
        jobs.append(("W", chunk, start))
    return tuple(jobs)


def zeropp_orders(p: int, m: int, unit: int, v: int = 2) -> list[list[Job]]:
    """ZeroPP: units of microbatches go through every chunk forward and every chunk backward, chunk by chunk.

    So each chunk's weights are gathered once a unit for each direction. Every device takes F and B in that order. What
    can begin first runs, B before F before W, and no device begins an F while it holds ``unit`` microbatches.
    """
    groups = [range(start, min(start + unit, m)) for start in range(0, m, unit)]
    forward: list[Job] = [("F", i, chunk) for group in groups for chunk in range(v) for i in group]
    backward: list[Job] = [("B", i, chunk) for group in groups for chunk in reversed(range(v)) for i in group]
    ends: dict[tuple[str, int, int], int] = {}
    devices = [_Device(list(reversed(forward)), list(reversed(backward))) for _ in range(p)]

    def begin(device: _Device, r: int, job: Job) -> float:
        kind, i, chunk = job
        stage = chunk * p + r
        needs = [("F", i, stage - 1)] if kind == "F" and stage else []
        if kind == "B":
            needs = [("F", i, stage)] + ([("B", i, stage + 1)] if stage < p * v - 1 else [])
        return max([device.clock, *(ends.get(need, inf) for need in needs)])

    for _ in range(3 * v * m * p):
        ready = [
            (begin(device, r, job), order, r, job)
            for r, device in enumerate(devices)
            for order, job in device.candidates(unit * v)
        ]
        start, _, r, job = min(ready)
        ends[job[0], job[1], job[2] * p + r] = devices[r].run(job, int(start))
    return [device.done for device in devices]


@dataclass
class _Device:
    """What a device has still to do, last first, what it holds and what it has done."""

    forward: list[Job]
    backward: list[Job]
    weights: list[Job] = field(default_factory=list)
    done: list[Job] = field(default_factory=list)
    clock: int = 0
    held: int = 0

    def candidates(self, most: int) -> list[tuple[int, Job]]:
        """The next job of each kind, in order of preference."""
        queues = (self.backward, self.forward if self.held < most else [], self.weights[:1])
        return [(order, queue[-1]) for order, queue in enumerate(queues) if queue]

    def run(self, job: Job, start: int) -> int:
        """Do a job; returns when it ends."""
        kind, i, chunk = job
        if kind == "F":
            self.forward.pop()
            self.held += 1
        elif kind == "B":
            self.backward.pop()
            self.weights.append(("W", i, chunk))
        else:
            self.weights.pop(0)
            self.held -= 1
        self.done.append(job)
        self.clock = start + 1
        return self.clock
