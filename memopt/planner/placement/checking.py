"""The independent check of a placement: slow, obvious, and sharing no code with any method.

Nothing leaves :func:`memopt.planner.place` without passing it. Integers only: a mixed-integer solver's tolerance has
produced placements in which two buffers overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

from memopt.planner.placement.problem import Buffer


def find_fault(
    buffers: Sequence[Buffer], offsets: Sequence[int], capacity: int | None = None, alignment: int = 1
) -> str | None:
    """The first rule that ``offsets`` break, in words, or ``None`` where there is none.

    Rules: one integer per buffer, none negative, each a multiple of ``alignment``, each end within ``capacity``, and
    no shared byte between two buffers alive at one moment. Cost: one comparison per pair that meets.
    """
    if len(offsets) != len(buffers):
        return f"{len(offsets)} offsets for {len(buffers)} buffers"
    for i, (buffer, offset) in enumerate(zip(buffers, offsets, strict=True)):
        name = _name(buffer, i)
        if type(offset) is not int:
            return f"offset of {name} is {offset!r}, not an integer"
        if offset < 0:
            return f"offset of {name} is negative: {offset}"
        if offset % alignment:
            return f"offset of {name} is {offset}, not a multiple of the alignment {alignment}"
        if capacity is not None and offset + buffer.size > capacity:
            return f"{name} ends at {offset + buffer.size}, beyond the capacity {capacity}"
    by_start = sorted(range(len(buffers)), key=lambda i: buffers[i].start)
    for position, i in enumerate(by_start):
        first, first_offset = buffers[i], offsets[i]
        for j in by_start[position + 1 :]:
            second, second_offset = buffers[j], offsets[j]
            if second.start >= first.stop:
                break
            if first.size == 0 or second.size == 0:
                continue
            if first_offset < second_offset + second.size and second_offset < first_offset + first.size:
                return f"{_name(first, i)} and {_name(second, j)} are alive at once and share bytes"
    return None


def peak_of(buffers: Sequence[Buffer], offsets: Sequence[int]) -> int:
    """The end of the highest buffer, in bytes."""
    return max((offset + buffer.size for buffer, offset in zip(buffers, offsets, strict=True)), default=0)


def _name(buffer: Buffer, index: int) -> str:
    return f"buffer {index} ({buffer.name})" if buffer.name else f"buffer {index}"
