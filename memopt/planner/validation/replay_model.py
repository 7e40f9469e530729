"""One block call's replays as the runtime does them: operation by operation, each at most once, as late as possible.

A value is a storage at one write version. The first need of a recomputed value counts how often every value on the way
to the block's recomputed ones will be read; then only what that value takes is run. A value goes with its last read; a
recomputed storage waits for its own backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from memopt.planner.values import Block, Op, Trace

Value = tuple[int, int]


class ReplayModel:
    """The replays of one block call.

    Args:
        trace, block: the call.
        wanted: its recomputed storages.
        exact: its other saved storages whose bytes come back unchanged.
    """

    def __init__(self, trace: Trace, block: Block, wanted: set[int], exact: set[int]) -> None:
        births = {storage.id: storage.birth for storage in trace.storages}
        ops = trace.ops[block.forward[0] : block.forward[1]]
        self.inside = {s for op in ops for s in op.writes if births[s] >= block.forward[0]}
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
        run: Callable[[Op, list[int]], None],
        drop: Callable[[int], None],
    ) -> None:
        """Bring a recomputed storage back.

        Args:
            storage: which.
            load: called with each saved storage that is read.
            run: called with each operation that runs and the storages that it allocates.
            drop: called with each storage that has been read for the last time.
        """
        if not self.started:
            self._start()
        for index in self._missing((storage, self.final[storage])):
            for value in self.reads[index]:
                if self.loadable(value):
                    load(value[0])
            made = [s for s, _ in self.makes[index]]
            before = {s for s, version in self.makes[index] if (s, version - 1) in self.there}
            run(self.ops[index], [s for s in made if s not in before])
            self.there.update(self.makes[index])
            for s, version in self.makes[index]:
                self.there.discard((s, version - 1))
            for value in (*self.reads[index], *self.makes[index]):
                self.uses[value] -= value in self.reads[index]
                if self.uses[value] <= 0 and value in self.there:
                    self.there.discard(value)
                    drop(value[0])

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
