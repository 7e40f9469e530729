"""Plans that treat a block as a whole."""

from __future__ import annotations

from collections.abc import Callable

from memopt.planner.problem import movable_inputs, replays
from memopt.planner.values import Action, Block, BlockPlan, SavedStorage, StorageAction, Trace


def by_storage(
    trace: Trace,
    fates: Callable[[int, Block, SavedStorage], dict[Action, float]],
    swaps_input: Callable[[int], bool] = lambda n: False,
) -> tuple[BlockPlan, ...]:
    """Plans from a function of (block's place, block, storage) to shares of actions.

    What cannot be recomputed, because no operation of the block writes it, is kept instead. Inputs of the blocks that
    ``swaps_input`` names leave whole, where they can.
    """
    inputs = movable_inputs(trace)
    births = {storage.id: storage.birth for storage in trace.storages}
    plans = []
    for n, block in enumerate(trace.blocks):
        found = replays(trace, block, births)
        actions = []
        for saved in block.saved:
            shares = fates(n, block, saved)
            if found[saved.storage] is None:
                shares = {Action.KEEP: 1.0}
            actions += [StorageAction(saved.index, saved.bytes, a, share) for a, share in shares.items() if share > 0]
        given = [StorageAction(s.index, s.bytes, Action.SWAP) for s in inputs[n] if swaps_input(n)]
        plans.append(BlockPlan(block.path, block.call, block.signature, tuple(actions), tuple(given)))
    return tuple(plans)
