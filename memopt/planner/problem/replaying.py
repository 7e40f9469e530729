"""Which operations must run again to bring back a saved storage, and what they read.

A block's saved storages are either available when it replays (kept, swapped in) or recomputed themselves, so the replay
of one of them goes back only through values that were not saved: N(s) holds the operations that write s, and, for each
of them, the operations that write the unsaved values it reads. A saved storage that is overwritten later in forward no
longer has the bytes that an earlier reader saw; such a reader needs the earlier writers too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from memopt.planner.values import Block, Op, Trace

# Operations whose outputs' shapes depend on values: what a block with one of them saves differs from step to step.
_DATA_DEPENDENT = frozenset({"nonzero", "nonzero_numpy", "masked_select", "unique", "_unique2", "unique_consecutive"})


def is_steady(trace: Trace, block: Block) -> bool:
    """Whether a block call saves the same storages in every step, so that a plan can speak of them."""
    names = (op.name.removeprefix("aten.").split(".")[0] for op in trace.ops[block.forward[0] : block.forward[1]])
    return _DATA_DEPENDENT.isdisjoint(names)


@dataclass(frozen=True)
class Replay:
    """What bringing back one saved storage takes: operations to run, saved storages and outside storages they read."""

    ops: tuple[int, ...]
    saved_reads: frozenset[int]
    outside_reads: frozenset[int]


def replays(trace: Trace, block: Block, births: Mapping[int, int]) -> dict[int, Replay | None]:
    """Find N(s) for every saved storage of a block call, by storage id; ``births`` are those of all storages.

    ``None`` stands for a storage that no operation of the block writes, so that no replay can bring it back.
    """
    ops = trace.ops[block.forward[0] : block.forward[1]]
    writers: defaultdict[int, list[int]] = defaultdict(list)
    for op in ops:
        for storage in op.writes:
            writers[storage].append(op.index)
    # A storage from outside that the block overwrites (a running statistic) is put right by the runtime, not replayed.
    inside = {storage for storage in writers if births[storage] >= block.forward[0]}
    saved = {s.storage for s in block.saved} & inside
    by_index = {op.index: op for op in ops}
    return {s.storage: _replay(s.storage, writers, inside, saved, by_index) for s in block.saved}


def _replay(
    storage: int, writers: dict[int, list[int]], inside: set[int], saved: set[int], ops: dict[int, Op]
) -> Replay | None:
    if storage not in saved:
        return None
    todo, done = list(writers[storage]), set(writers[storage])
    saved_reads, outside_reads = set(), set()
    while todo:
        op = ops[todo.pop()]
        for value in op.reads:
            if value not in inside:
                outside_reads.add(value)
                continue
            if value in saved and value != storage and writers[value][-1] < op.index:
                saved_reads.add(value)
                continue
            for writer in writers[value]:
                if writer < op.index and writer not in done:
                    done.add(writer)
                    todo.append(writer)
    return Replay(tuple(sorted(done)), frozenset(saved_reads), frozenset(outside_reads))
