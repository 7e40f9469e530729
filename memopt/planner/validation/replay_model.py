"""One block call's replays as the runtime does them: operation by operation, each at most once, as late as possible.

A value is a storage at one write version. The first need of a recomputed value counts how often every value on the way
to the block's recomputed ones will be read; then only what that value takes is run. A value goes with its last read; a
recomputed storage waits for its own backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from memopt.planner.values import Block, Category, Op, Storage, Trace

Value = tuple[int, int]

SMALL_BYTES = 2**16  # a buffer of at most so many bytes is copied in any case: a replay that strays may read it


class ReplayModel:
    """The replays of one block call.

    Args:
        trace, block: the call.
        wanted: its recomputed storages.
        exact: its other saved storages whose bytes come back unchanged.
    """

    def __init__(self, trace: Trace, block: Block, wanted: set[int], exact: set[int]) -> None:
        storages = {storage.id: storage for storage in trace.storages}
        ops = trace.ops[block.forward[0] : block.forward[1]]
        self.inside = {s for op in ops for s in op.writes if storages[s].birth >= block.forward[0]}
        self.outside: dict[int, tuple[Storage, int]] = {}
        for op in reversed(ops):
            self.outside.update({s: (storages[s], op.index) for s in op.writes if s not in self.inside})
        self.wanted, self.exact = wanted & self.inside, exact & self.inside
        self.unwritten = wanted - self.inside
        self.reads: dict[int, list[Value]] = {}
        self.makes: dict[int, list[Value]] = {}
        self.producer: dict[Value, int] = {}
        self.final: dict[int, int] = {}
        for op in ops:
            self.reads[op.index] = [(s, self.final.get(s, -1)) for s in op.reads if s in self.inside]
            for s in op.writes:
                if s in self.inside:
                    self.final[s] = self.final.get(s, -1) + 1
                    self.producer[s, self.final[s]] = op.index
            self.makes[op.index] = [(s, self.final[s]) for s in op.writes if s in self.inside]
        self.ops = {op.index: op for op in ops}
        self.uses: Counter[Value] = Counter()
        self.there: set[Value] = set()
        self.started = False

    def loadable(self, value: Value) -> bool:
        """Whether a saved storage supplies the value."""
        storage, version = value
        return storage in self.exact and self.final[storage] == version

    def cone(self, storage: int) -> tuple[set[int], set[int]]:
        """What bringing back a recomputed storage takes: the saved storages that are read, the operations that run."""
        sources, ops, todo, seen = set(), set(), [(storage, self.final[storage])], set()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            if self.loadable(value):
                sources.add(value[0])
            elif value in self.producer:
                ops.add(self.producer[value])
                todo += self.reads[self.producer[value]]
        return sources, ops

    def copies(self) -> list[int]:
        """Storages from outside that must be copied before the block overwrites them."""
        run = set[int]().union(*(self.cone(storage)[1] for storage in self.wanted))
        found = []
        for number, (storage, first_write) in sorted(self.outside.items()):
            buffer = storage.category is Category.WEIGHTS
            small = buffer and storage.bytes <= SMALL_BYTES
            # A later call may change a buffer again; an input stays as this call leaves it.
            if small or any(number in self.ops[op].reads and (buffer or op <= first_write) for op in run):
                found.append(number)
        return found

    def _start(self) -> None:
        """Counts the reads that are still to come."""
        needed = {(s, self.final[s]) for s in self.wanted}
        self.uses.update(needed)
        for index in sorted(self.ops, reverse=True):
            if any(value in needed and not self.loadable(value) for value in self.makes[index]):
                for read in self.reads[index]:
                    self.uses[read] += 1
                    needed.add(read)
        self.started = True

    def need(
        self,
        storage: int,
        load: Callable[[int], None],
        run: Callable[[Op, list[Value]], None],
        drop: Callable[[Value], None],
    ) -> None:
        """Bring a recomputed storage back.

        Args:
            storage: which.
            load: called with each saved storage that is read.
            run: called with each operation that runs and the values that it puts into buffers of their own.
            drop: called with each value that has been read for the last time, or is about to be overwritten.
        """
        if not self.started:
            self._start()
        for index in self._missing((storage, self.final[storage])):
            for value in self.reads[index]:
                if self.loadable(value):
                    load(value[0])
            for s, version in self.makes[index]:
                before = s, version - 1
                # What somebody else will read is copied before it is overwritten.
                if before in self.there and self.uses[before] <= (before in self.reads[index]):
                    self.there.discard(before)
                    drop(before)
            self.there.update(self.makes[index])
            run(self.ops[index], self.makes[index])
            for value in self.reads[index]:
                self._used(value, drop)
            for value in self.makes[index]:
                self._drop_unused(value, drop)

    def done(self, storage: int, drop: Callable[[Value], None]) -> None:
        """Backward does not need a recomputed storage any more; another replay still may."""
        if self.started:
            self._used((storage, self.final[storage]), drop)
        else:
            self.wanted.discard(storage)

    def _used(self, value: Value, drop: Callable[[Value], None]) -> None:
        self.uses[value] -= 1
        self._drop_unused(value, drop)

    def _drop_unused(self, value: Value, drop: Callable[[Value], None]) -> None:
        if self.uses[value] <= 0 and value in self.there:
            self.there.discard(value)
            drop(value)

    def _missing(self, value: Value) -> list[int]:
        found: set[int] = set()
        todo = [value]
        while todo:
            one = todo.pop()
            if one in self.there or self.loadable(one):
                continue
            number = self.producer.get(one)
            if number is not None and number not in found:
                found.add(number)
                todo += self.reads[number]
        return sorted(found)
