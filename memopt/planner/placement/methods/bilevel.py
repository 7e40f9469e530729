"""Two levels: what lives inside one window of time is placed first, then each window counts as one buffer.

Source: MEMO (arXiv 2407.12117), section 4.2: level 1 places the transient requests of one layer's forward and of one
layer's backward, level 2 the layers' pseudo requests and all the rest. Equal windows are solved once and get equal
inner offsets, so every repetition of a layer sees the same addresses relative to its window. Restricted, hence never
better than a flat placement; what it loses is printed by ``python -m benchmarks.placement``.
"""

from __future__ import annotations

from collections.abc import Sequence

from memopt.planner.placement.problem import Buffer
from memopt.planner.placement.task import Method, Task

Window = tuple[int, int]


def two_levels(
    buffers: Sequence[Buffer], windows: Sequence[Window], seed: int = 0, time_limit: float = 20.0
) -> tuple[int, ...]:
    """Offsets in bytes, by buffer.

    Args:
        buffers: as for ``place``.
        windows: ``[start, stop)`` stretches of time that do not meet, such as each layer's forward and backward. A
            buffer that lies inside one is placed with it, all others on the second level.
        seed, time_limit: of each single placement.

    Raises:
        ValueError: windows that are empty or meet.
    """
    from memopt.planner.placement.placing import place

    ordered = sorted(windows)
    for i, (start, stop) in enumerate(ordered):
        if start >= stop or (i and start < ordered[i - 1][1]):
            raise ValueError(f"window [{start}, {stop}) is empty or meets the one before it")
    solved: dict[tuple[Buffer, ...], tuple[tuple[int, ...], int]] = {}
    outer: list[Buffer] = []
    inside: list[tuple[list[int], tuple[int, ...], int]] = []  # buffers, their inner offsets, index in outer
    taken: set[int] = set()
    for start, stop in ordered:
        members = [i for i, b in enumerate(buffers) if start <= b.start and b.stop <= stop and i not in taken]
        if not members:
            continue
        members.sort(key=lambda i: (buffers[i].start, buffers[i].stop, buffers[i].size))
        moved = tuple(Buffer(buffers[i].start - start, buffers[i].stop - start, buffers[i].size) for i in members)
        if moved not in solved:
            level = place(moved, seed=seed, time_limit=time_limit, methods=["greedy", "search"])
            solved[moved] = (level.offsets, level.peak)
        offsets, peak = solved[moved]
        taken.update(members)
        inside.append((members, offsets, len(outer)))
        first, last = min(b.start for b in moved) + start, max(b.stop for b in moved) + start
        outer.append(Buffer(first, last, peak))
    rest = [i for i in range(len(buffers)) if i not in taken]
    level = place([*outer, *(buffers[i] for i in rest)], seed=seed, time_limit=time_limit, methods=["greedy", "search"])
    result = [0] * len(buffers)
    for members, offsets, index in inside:
        for i, offset in zip(members, offsets, strict=True):
            result[i] = level.offsets[index] + offset
    for i, offset in zip(rest, level.offsets[len(outer) :], strict=True):
        result[i] = offset
    return tuple(result)


def windows_of(buffers: Sequence[Buffer], longest: int) -> list[Window]:
    """The stretches of time that buffers no longer than ``longest`` cover: without layers given, the best guess."""
    short = sorted((b.start, b.stop) for b in buffers if b.stop - b.start <= longest)
    windows: list[Window] = []
    for start, stop in short:
        if windows and start < windows[-1][1]:
            windows[-1] = (windows[-1][0], max(stop, windows[-1][1]))
        else:
            windows.append((start, stop))
    return windows


def run(task: Task) -> None:
    """Tries windows made of buffers of at most 1, 2, 4, ... sections."""
    part = task.part
    buffers = [Buffer(low, high, size) for low, high, size in zip(part.low, part.high, part.size, strict=True)]
    longest = 1
    while longest < part.sections and not task.done and task.seconds_left():
        windows = windows_of(buffers, longest)
        if len(windows) > 1:
            task.offer(two_levels(buffers, windows, task.seed, task.seconds_left()), f"bilevel (windows of {longest})")
        longest *= 2


METHOD = Method("bilevel", rank=4, run=run, default=False)
