"""What the simulation holds, from moment to moment: bytes by category, the peak, and every allocation that was made."""

from __future__ import annotations

from collections.abc import Mapping

from memopt.planner.validation.simulation import Simulation
from memopt.planner.values import Category, Storage

Key = tuple[str, int]
"""What is held of a storage: the storage itself, a copy of some kind, or what a replay writes again."""


class Ledger:
    """Books what is held; the peak and the moments go into a simulation.

    Args:
        storages: of the trace, by id.
        found: what is being filled in.
    """

    def __init__(self, storages: Mapping[int, Storage], found: Simulation) -> None:
        self._storages, self._found = storages, found
        self._since: dict[Key, int] = {}
        self._by_category = dict.fromkeys(Category, 0)
        self.held: dict[Key, int] = {}

    def hold(self, key: Key, size: int | None = None) -> None:
        """So many bytes of a storage, all of them by default, are held under a key from now on."""
        storage = self._storages[key[1]]
        size = storage.bytes if size is None else size
        before, now = self.held.get(key, 0), len(self._found.moments)
        if size == before:
            return
        self._by_category[storage.category] += size - before
        if before and self._since[key] < now:
            self._found.allocations.append(self._allocation(key, before, now))
        self._since[key] = now
        if size:
            self.held[key] = size
        else:
            self.held.pop(key, None)

    def drop(self, key: Key) -> None:
        """Nothing is held under a key any more."""
        self.hold(key, 0)

    def _allocation(self, key: Key, size: int, stop: int) -> Storage:
        storage = self._storages[key[1]]
        name = storage.name if key[0] == "storage" else f"{storage.name}, {key[0]}"
        number = len(self._found.allocations)
        return Storage(number, size, storage.category, self._since[key], stop, storage.producer, name)

    def measure(self, seconds: float, index: int, name: str) -> None:
        """A moment of the step, at which what is held now is held together."""
        found, sizes = self._found, tuple(self._by_category.values())
        found.moments.append((seconds, sizes))
        total = sum(sizes)
        if total > found.peak_bytes:
            found.peak_bytes, found.peak_at, found.peak_index = total, name, index
            found.by_category = {category.value: size for category, size in self._by_category.items()}

    def close(self) -> None:
        """The step is over: everything that is still held becomes an allocation up to its end."""
        for key in list(self.held):
            self.drop(key)
