"""MEMO's closed form (2407.12117, section 4.1): one fraction alpha of tokens is swapped, the rest recomputed.

The layer's input and the attention's output leave whole; of everything else a fraction alpha of the tokens leaves and
1 - alpha is discarded and recomputed. The last two layers keep all.

    alpha = min(T_layer * B - S_in - S_attn, M_host / (n - 2) - S_in - S_attn) / S_other, clipped to [0, 1]

S_in counts the inputs that the layer saves and that no other layer needs.
"""

from __future__ import annotations

from memopt.planner.baselines.whole_blocks import by_storage
from memopt.planner.devices import Rates
from memopt.planner.problem import movable_inputs
from memopt.planner.values import Action, Block, BlockPlan, SavedStorage, Trace


def choose(trace: Trace, rates: Rates, budget_bytes: int) -> tuple[BlockPlan, ...]:
    """MEMO knows no budget: alpha follows from the link and the host alone."""
    fraction = alpha(trace, rates)
    layers = len(trace.blocks) - 2

    def fate(n: int, block: Block, saved: SavedStorage) -> dict[Action, float]:
        if n >= layers or rates.tier == "none":
            return {Action.KEEP: 1.0}
        if _is_attention(trace, saved):
            return {Action.SWAP: 1.0}
        return {Action.SWAP: fraction, Action.RECOMPUTE: 1.0 - fraction}

    return by_storage(trace, fate, lambda n: n < layers and rates.tier != "none")


def alpha(trace: Trace, rates: Rates) -> float:
    """The share of tokens that the link and the host have room for."""
    layers = len(trace.blocks) - 2
    if layers < 1:
        return 0.0
    block = trace.blocks[0]
    ops = trace.ops[block.forward[0] : block.forward[1]]
    compute = sum(rates.seconds(op.flops, op.bytes_read + op.bytes_written) for op in ops)
    attention = sum(saved.bytes for saved in block.saved if _is_attention(trace, saved))
    whole = attention + sum(saved.bytes for saved in movable_inputs(trace)[0])
    other = sum(saved.bytes for saved in block.saved) - attention
    if not other:
        return 0.0
    by_link = (compute * rates.swap_out_bytes_per_second - whole) / other
    by_host = (rates.host_bytes / layers - whole) / other
    return max(0.0, min(1.0, by_link, by_host))


def _is_attention(trace: Trace, saved: SavedStorage) -> bool:
    return "attention" in trace.ops[saved.producer].name
