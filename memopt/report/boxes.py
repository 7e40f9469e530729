"""Storages as boxes, lifetime by address, for maps and exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memopt.planner import Buffer, Storage, place


@dataclass(frozen=True)
class Box:
    """A storage that lies at ``[offset, offset + bytes)`` of one arena during operations ``[start, stop)``.

    ``name`` and ``category`` are what maps show of it.
    """

    start: int
    stop: int
    offset: int
    bytes: int
    name: str
    category: str


def boxes_of(storages: Sequence[Storage], offsets: Sequence[int] | None = None) -> list[Box]:
    """Boxes for the ``storages`` of a trace; without ``offsets`` they are placed first.

    Storages that hold nothing, or are alive at no operation, are left out.

    Raises:
        ValueError: another number of offsets than of storages.
    """
    kept = [storage for storage in storages if storage.bytes and storage.birth < storage.death]
    if offsets is None:
        offsets = place([Buffer(s.birth, s.death, s.bytes, s.name) for s in kept]).offsets
    else:
        if len(offsets) != len(storages):
            raise ValueError(f"{len(offsets)} offsets for {len(storages)} storages, expected one each")
        at = {storage.id: offset for storage, offset in zip(storages, offsets, strict=True)}
        offsets = [at[storage.id] for storage in kept]
    return [
        Box(s.birth, s.death, offset, s.bytes, s.name, s.category.value)
        for s, offset in zip(kept, offsets, strict=True)
    ]
