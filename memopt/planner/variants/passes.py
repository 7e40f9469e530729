"""The forward and backward passes of a step that accumulates gradients.

Every pass runs under the same plan: the runtime counts the calls of a block from each forward of the model. From the
second pass on the gradients are alive all the time, so the last pass holds the most, and it is the one to plan for.
"""

from __future__ import annotations

from dataclasses import replace

from memopt.planner.values import Phase, Trace


def pass_starts(trace: Trace) -> list[int]:
    """The first operation of every pass: forward runs there, and before it either nothing did or a backward."""
    starts, behind = [0], False
    for op in trace.ops:
        if op.phase is Phase.BACKWARD:
            behind = True
        elif op.phase is Phase.FORWARD and behind:
            starts.append(op.index)
            behind = False
    return starts


def last_pass(trace: Trace) -> tuple[Trace, int]:
    """The step as if only its last pass had anything to decide about, and how many passes there are.

    Operations keep their numbers; those before the last pass cost nothing, touch nothing and belong to no block, and
    what is gone when the last pass begins is left out.
    """
    starts = pass_starts(trace)
    start = starts[-1]
    if len(starts) == 1:
        return trace, 1
    first = next((n for n, block in enumerate(trace.blocks) if block.forward[0] >= start), len(trace.blocks))
    ops = tuple(
        replace(op, block=None, flops=0, bytes_read=0, bytes_written=0, reads=(), writes=())
        if op.index < start
        else replace(op, block=None if op.block is None else op.block - first)
        for op in trace.ops
    )
    storages = tuple(storage for storage in trace.storages if storage.death > start)
    return replace(trace, ops=ops, storages=storages, blocks=trace.blocks[first:]), len(starts)
