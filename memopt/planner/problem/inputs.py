"""Which of a block's saved inputs a plan may move: those that nothing else needs between its forward and backward."""

from __future__ import annotations

from collections import Counter, defaultdict

from memopt.planner.values import Category, Phase, SavedStorage, Trace


def movable_inputs(trace: Trace) -> list[tuple[SavedStorage, ...]]:
    """For each block call its saved inputs that forward made, that only this call saves, that only its own operations
    use in backward, and that are gone when its backward is over."""
    storages = {storage.id: storage for storage in trace.storages}
    holders = Counter(saved.storage for block in trace.blocks for saved in (*block.saved, *block.saved_inputs))
    users: defaultdict[int, set[int | None]] = defaultdict(set)
    for op in trace.ops:
        if op.phase is Phase.BACKWARD:
            for storage in (*op.reads, *op.writes):
                users[storage].add(op.block)
    return [
        tuple(
            saved
            for saved in block.saved_inputs
            if storages[saved.storage].producer is not None
            and storages[saved.storage].category is not Category.WEIGHTS
            and storages[saved.storage].death <= block.backward[1]
            and holders[saved.storage] == 1
            and users[saved.storage] <= {number}
        )
        for number, block in enumerate(trace.blocks)
    ]
