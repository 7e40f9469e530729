"""Export for PyTorch's memory viewer (pytorch.org/memory_viz) and ``python -m torch.cuda._memory_viz``.

The file is a pickle as ``torch.cuda.memory._dump_snapshot`` writes it: the history of allocations and frees, and the
state at the end. One segment stands for the whole arena; a storage's category, producer and name take the place of a
stack frame's file, line and function. What the viewer's own code requires, beyond the keys: pickle protocol 2 to 4,
blocks that fill their segment without gaps, and the category ``unknown`` among the events as soon as any event has one.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from typing import Any

from memopt.files import write_whole
from memopt.report.boxes import Box

_BASE = 1 << 40  # where the arena begins; an address of 0 would read as none
_PROTOCOL = 4


def write_snapshot(path: str | os.PathLike[str], boxes: Sequence[Box]) -> None:
    """Writes the allocations and frees of one step, in order, as a memory snapshot of device 0.

    Args:
        path: the file; it appears whole or not at all.
        boxes: of :func:`memopt.report.boxes_of`. Those that live to the end of the step are its final state.

    Raises:
        ValueError: no box, or two boxes alive at once that share addresses.
    """
    write_whole(path, pickle.dumps(snapshot_of(boxes), protocol=_PROTOCOL))


def snapshot_of(boxes: Sequence[Box]) -> dict[str, Any]:
    """The snapshot as the viewer reads it."""
    if not boxes:
        raise ValueError("boxes is empty, expected the storages of a step")
    end = max(box.stop for box in boxes)
    arena = max(box.offset + box.bytes for box in boxes)
    # At one moment frees (0) come before allocations (1): lifetimes are half-open.
    events = [(box.start, 1, i) for i, box in enumerate(boxes)]
    events += [(box.stop, 0, i) for i, box in enumerate(boxes) if box.stop < end]
    history = [_event("segment_alloc", _BASE, arena, [], "unknown", 0)]
    for time, begins, i in sorted(events):
        box = boxes[i]
        for action in ["alloc"] if begins else ["free_requested", "free_completed"]:
            history.append(_event(action, _BASE + box.offset, box.bytes, _frames(box), box.category, time))
    blocks = _blocks(sorted((box for box in boxes if box.stop == end), key=lambda box: box.offset), arena)
    active = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
    segment = {
        "device": 0,
        "address": _BASE,
        "total_size": arena,
        "allocated_size": active,
        "active_size": active,
        "requested_size": active,
        "stream": 0,
        "segment_type": "large",
        "frames": [],
        "blocks": blocks,
    }
    return {"segments": [segment], "device_traces": [history], "external_annotations": [], "allocator_settings": {}}


def _event(action: str, address: int, size: int, frames: list[Any], category: str, time: int) -> dict[str, Any]:
    return {
        "action": action,
        "addr": address,
        "size": size,
        "stream": 0,
        "frames": frames,
        "category": category,
        "time_us": time,
    }


def _frames(box: Box) -> list[dict[str, Any]]:
    return [{"filename": box.category, "line": box.start, "name": box.name}]


def _blocks(alive: Sequence[Box], arena: int) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    at = 0

    def gap(until: int) -> None:
        if until > at:
            state = {"address": _BASE + at, "size": until - at, "requested_size": 0, "state": "inactive", "frames": []}
            blocks.append(state)

    for box in alive:
        if box.offset < at:
            raise ValueError(f"storage {box.name!r} at offset {box.offset} overlaps the one before it")
        gap(box.offset)
        blocks.append(
            {
                "address": _BASE + box.offset,
                "size": box.bytes,
                "requested_size": box.bytes,
                "state": "active_allocated",
                "frames": _frames(box),
            }
        )
        at = box.offset + box.bytes
    gap(arena)
    return blocks
