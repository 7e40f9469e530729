"""ProTrain's choice per block: swap some blocks whole, checkpoint some, keep the rest (2406.08334, section on blocks).

Swapped blocks are spread so that copying one out takes no longer than computing the blocks up to the next one; the
checkpointed ones come first among the others, so that backward meets unoptimised blocks first. The two counts are found
by trying all that fit: for each number of swapped blocks the smallest number of checkpointed ones.
"""

from __future__ import annotations

import math

from memopt.planner.baselines.whole_blocks import by_storage
from memopt.planner.devices import Rates
from memopt.planner.validation import simulate
from memopt.planner.values import Action, BlockPlan, Trace


def choose(trace: Trace, rates: Rates, budget_bytes: int) -> tuple[BlockPlan, ...]:
    """The fastest pair of counts whose peak is within the budget; all blocks checkpointed where none is."""
    count = len(trace.blocks)
    best, best_seconds = arrange(trace, rates, 0, count), math.inf
    most_swapped = count if rates.tier != "none" else 0
    for swapped in range(most_swapped + 1):
        low, high = 0, count - swapped
        while low < high:
            middle = (low + high) // 2
            fits = simulate(trace, arrange(trace, rates, swapped, middle), rates).peak_bytes <= budget_bytes
            low, high = (low, middle) if fits else (middle + 1, high)
        plans = arrange(trace, rates, swapped, low)
        played = simulate(trace, plans, rates)
        if played.broken is None and played.peak_bytes <= budget_bytes and played.step_seconds < best_seconds:
            best, best_seconds = plans, played.step_seconds
    return best


def arrange(trace: Trace, rates: Rates, swapped: int, checkpointed: int) -> tuple[BlockPlan, ...]:
    """Plans with so many blocks swapped, interleaved, and so many of the others checkpointed, first ones first."""
    count = len(trace.blocks)
    interval = _interval(trace, rates) if rates.overlap else 1
    last = max(count - 1, 0) if rates.overlap else count  # the last block has no other to copy beside
    places = [p for start in range(interval) for p in range(start, last, interval)][:swapped]
    away = set(places)
    again = set([n for n in range(count) if n not in away][:checkpointed])

    def fate(n: int) -> Action:
        return Action.SWAP if n in away else Action.RECOMPUTE if n in again else Action.KEEP

    return by_storage(trace, lambda n, block, saved: {fate(n): 1.0}, lambda n: n in away)


def _interval(trace: Trace, rates: Rates) -> int:
    """Blocks that compute while one block's activations are copied out."""
    if not trace.blocks:
        return 1
    block = trace.blocks[0]
    ops = trace.ops[block.forward[0] : block.forward[1]]
    compute = sum(rates.seconds(op.flops, op.bytes_read + op.bytes_written) for op in ops)
    copy = sum(saved.bytes for saved in block.saved) / rates.swap_out_bytes_per_second
    return max(1, min(len(trace.blocks), math.ceil(copy / compute))) if compute > 0 else 1
