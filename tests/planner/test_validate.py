"""The simulation by hand, and every rule that ``validate`` names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from memopt.planner import Action, BlockPlan, Plan, StorageAction, Trace, plan, validate
from memopt.planner.devices import Rates
from memopt.planner.validation import simulate
from tests.planner.toy import CPU, GPU, transformer

NORM, QKV, ATTENTION, MIDDLE, NORM2, UP, GELU = range(7)


def with_actions(trace: Trace, chosen: dict[tuple[int, int], Action]) -> tuple[BlockPlan, ...]:
    return tuple(
        BlockPlan(
            block.path,
            block.call,
            block.signature,
            tuple(StorageAction(s.index, s.bytes, chosen.get((n, s.index), Action.KEEP)) for s in block.saved),
        )
        for n, block in enumerate(trace.blocks)
    )


def test_the_plain_step_is_the_traced_one() -> None:
    trace = transformer(4)
    played = simulate(trace, (), CPU)
    assert played.peak_bytes == trace.peak_bytes
    assert played.step_seconds == pytest.approx(played.compute_seconds)
    assert sum(played.by_category.values()) == played.peak_bytes


def test_recompute_costs_its_operations_and_frees_its_bytes() -> None:
    trace = transformer(3, unit=1000, logits=40)
    gelu = next(op for op in trace.ops if op.name == "gelu")
    played = simulate(trace, with_actions(trace, {(n, GELU): Action.RECOMPUTE for n in range(3)}), CPU)
    assert played.recompute_seconds == pytest.approx(3 * CPU.seconds(gelu.flops, gelu.bytes_read + gelu.bytes_written))
    assert played.peak_bytes == trace.peak_bytes - 3 * 4000


def test_a_chain_is_replayed_once_and_not_beyond_what_is_kept() -> None:
    trace = transformer(2, unit=1000, logits=40)
    played = simulate(trace, with_actions(trace, {(0, a): Action.RECOMPUTE for a in (NORM2, UP, GELU)}), CPU)
    ops = [op for op in trace.ops[: trace.blocks[0].forward[1]] if op.name in ("norm", "up", "gelu")][1:]
    cost = sum(CPU.seconds(op.flops, op.bytes_read + op.bytes_written) for op in ops)
    assert [op.name for op in ops] == ["norm", "up", "gelu"]
    assert played.recompute_seconds == pytest.approx(cost)


def test_a_compressed_value_feeds_no_replay() -> None:
    trace = transformer(2, unit=1000)
    chosen = {(0, UP): Action.COMPRESS, (0, GELU): Action.RECOMPUTE}
    plans = with_actions(trace, chosen)
    packed = tuple(replace(a, format="8bit") if a.action is Action.COMPRESS else a for a in plans[0].actions)
    played = simulate(trace, (replace(plans[0], actions=packed), plans[1]), CPU)
    ops = [op for op in trace.ops[: trace.blocks[0].forward[1]] if op.name in ("up", "gelu")]
    cost = sum(CPU.seconds(op.flops, op.bytes_read + op.bytes_written) for op in ops)
    assert played.recompute_seconds == pytest.approx(cost)


def test_a_storage_stays_as_long_as_forward_or_another_call_holds_it() -> None:
    trace = transformer(2, unit=1000)
    plans = with_actions(trace, {(0, UP): Action.SWAP})
    block = trace.blocks[0]
    held = tuple(replace(s, let_go=block.forward[1] + 2) if s.index == UP else s for s in block.saved)
    longer = replace(trace, blocks=(replace(block, saved=held), *trace.blocks[1:]))
    # Without overlap, nor replays, a moment is an operation, but for the copies.
    early, late = simulate(trace, plans, CPU), simulate(longer, plans, CPU)
    more = [sum(b) - sum(a) for (_, a), (_, b) in zip(early.moments, late.moments, strict=True)]
    used = block.saved[UP].storage
    gone = 1 + max(op.index for op in trace.ops[: block.forward[1]] if used in (*op.reads, *op.writes))
    assert more == [4000 * (gone <= n < block.forward[1] + 2) for n in range(len(trace.ops))]


def test_what_is_held_until_backward_wants_it_back_is_there_twice() -> None:
    trace = transformer(2, unit=1000)
    block = trace.blocks[1]
    needed = min(op.index for op in trace.ops[block.backward[0] :] if block.saved[UP].storage in op.reads)
    held = tuple(replace(s, let_go=needed + 1) if s.index == UP else s for s in block.saved)
    longer = replace(trace, blocks=(trace.blocks[0], replace(block, saved=held)))
    kept = simulate(trace, (), CPU)
    late = simulate(longer, with_actions(trace, {(1, UP): Action.SWAP}), CPU)
    more = [sum(b) - sum(a) for (_, a), (_, b) in zip(kept.moments, late.moments, strict=True)]
    assert more == [4000 * (n == needed) for n in range(len(trace.ops))]


def test_swaps_without_overlap_hold_up_the_step_both_ways() -> None:
    trace = transformer(2, unit=1000)
    played = simulate(trace, with_actions(trace, {(0, UP): Action.SWAP}), CPU)
    assert played.swapped_bytes == played.host_bytes == 4000
    assert played.stall_seconds == pytest.approx(2 * 4000 / CPU.swap_out_bytes_per_second)


def test_swaps_beside_compute_cost_nothing_on_a_fast_link_and_stall_on_a_slow_one() -> None:
    trace = transformer(4, unit=1000, flops=10**9)
    plans = with_actions(trace, {(0, UP): Action.SWAP, (1, UP): Action.SWAP})
    assert simulate(trace, plans, GPU).stall_seconds == 0
    slow = replace(GPU, swap_out_bytes_per_second=1e5, swap_in_bytes_per_second=1e5)
    assert simulate(trace, plans, slow).stall_seconds > 0


def test_the_last_block_has_nothing_to_copy_beside() -> None:
    trace = transformer(3)
    broken = simulate(trace, with_actions(trace, {(2, UP): Action.SWAP}), GPU).broken
    assert broken is not None
    assert "block blocks.2 (call 0) swaps, but no other block runs" in broken


@pytest.fixture(scope="module")
def made() -> Plan:
    trace = transformer(3)
    return plan(trace, int(trace.peak_bytes * 0.8), CPU)


def first(found: Plan, edit: Callable[[BlockPlan], BlockPlan]) -> Plan:
    return replace(found, blocks=(edit(found.blocks[0]), *found.blocks[1:]))


def first_action(found: Plan, **changes: object) -> Plan:
    def edit(block: BlockPlan) -> BlockPlan:
        return replace(block, actions=(replace(block.actions[0], **changes), *block.actions[1:]))  # type: ignore[arg-type]

    return first(found, edit)


def first_input(found: Plan, **changes: object) -> Plan:
    given = replace(StorageAction(0, 1000, Action.SWAP), **changes)  # type: ignore[arg-type]
    return first(found, lambda block: replace(block, inputs=(given,)))


RULES: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "other model": (lambda p: replace(p, model_signature="0"), "made for another model"),
    "unknown block": (lambda p: first(p, lambda b: replace(b, path="nowhere")), r"block nowhere \(call 0\) is not in"),
    "twice": (lambda p: replace(p, blocks=(*p.blocks, p.blocks[0])), r"blocks\.0 \(call 0\) is planned twice"),
    "signature": (lambda p: first(p, lambda b: replace(b, signature="x")), "has signature toy-block"),
    "unknown storage": (lambda p: first_action(p, index=77), "saved storage 77 is not in the trace"),
    "size": (lambda p: first_action(p, bytes=5), "saved storage 0 has 1000 bytes, not 5"),
    "fraction": (lambda p: first_action(p, fraction=1.5), "has the fraction 1.5"),
    "not all": (lambda p: first_action(p, fraction=0.5), "fates cover 0.5 of it"),
    "format": (lambda p: first_action(p, format="8bit"), "a format is for compressed"),
    "rows": (lambda p: first_action(p, index=1, action=Action.RECOMPUTE, fraction=0.5), "saved storage 1"),
    "input action": (lambda p: first_input(p, action=Action.RECOMPUTE), "inputs can be kept or swapped"),
    "input unknown": (lambda p: first_input(p, index=4), "saved input 4 is not in the trace"),
    "input share": (lambda p: first_input(p, fraction=0.5), "saved input 0: its fates cover 0.5 of it"),
    "no fate": (lambda p: first(p, lambda b: replace(b, actions=b.actions[1:])), "storage 0: its fates cover 0 of it"),
    "budget": (lambda p: replace(p, budget_bytes=p.peak_bytes - 1), "exceeds the budget"),
    "promise": (lambda p: replace(p, peak_bytes=p.peak_bytes - 1), "the plan promises"),
}


@pytest.mark.parametrize("rule", RULES)
def test_broken_rules_are_named(made: Plan, rule: str) -> None:
    trace = transformer(3)
    assert validate(trace, made, CPU).broken is None
    edit, message = RULES[rule]
    broken = validate(trace, edit(made), CPU).broken
    assert broken is not None
    assert re.search(message, broken), broken


def test_too_little_room_in_the_tier_is_a_broken_rule() -> None:
    trace = transformer(4)
    found = plan(trace, int(trace.peak_bytes * 0.8), CPU, actions=["swap"])
    broken = validate(trace, found, replace(CPU, host_bytes=10)).broken
    assert broken is not None
    assert "exceed the 10 of the disk" in broken


def test_recomputing_what_no_operation_writes_is_broken() -> None:
    trace = transformer(2)
    outside = trace.blocks[0].inputs[0]
    saved = (*trace.blocks[0].saved, replace(trace.blocks[0].saved[0], index=7, storage=outside))
    odd = replace(trace, blocks=(replace(trace.blocks[0], saved=saved), trace.blocks[1]))
    broken = simulate(odd, with_actions(odd, {(0, 7): Action.RECOMPUTE}), CPU).broken
    assert broken is not None
    assert "which none of its operations writes" in broken


def with_input(trace: Trace, block: int, *parts: StorageAction) -> tuple[BlockPlan, ...]:
    plans = list(with_actions(trace, {}))
    plans[block] = replace(plans[block], inputs=parts)
    return tuple(plans)


@pytest.mark.parametrize("rates", [CPU, GPU], ids=lambda r: r.name)
def test_a_swapped_input_is_away_between_the_blocks(rates: Rates) -> None:
    trace = transformer(5, unit=1000, logits=40)
    played = simulate(trace, with_input(trace, 1, StorageAction(0, 1000, Action.SWAP)), rates)
    assert played.broken is None
    assert played.swapped_bytes == 1000
    assert played.peak_bytes == trace.peak_bytes - 1000


def test_a_swapped_input_is_back_for_the_first_replay() -> None:
    trace = transformer(3, unit=1000, logits=0)
    start = trace.blocks[2].backward[0]
    chosen = {(2, GELU): Action.RECOMPUTE}

    def live(plans: tuple[BlockPlan, ...]) -> int:
        """Bytes when the last block's first backward operation runs, which needs the recomputed storage."""
        moments = simulate(trace, plans, CPU).moments
        return sum(moments[start + 1][1])  # the replay is a moment of its own

    plain = with_actions(trace, chosen)
    moved = (*plain[:2], replace(plain[2], inputs=(StorageAction(0, 1000, Action.SWAP),)))
    assert live(moved) == live(plain)


def test_an_input_that_another_block_saves_too_is_not_swapped() -> None:
    trace = transformer(3)
    storage = trace.blocks[1].saved_inputs[0].storage
    shared = replace(trace.blocks[0].saved[0], index=7, storage=storage)
    both = replace(trace.blocks[0], saved=(*trace.blocks[0].saved, shared))
    odd = replace(trace, blocks=(both, *trace.blocks[1:]))
    found = plan(odd, None, CPU)
    moved = replace(found.blocks[1], inputs=(StorageAction(0, 1000, Action.SWAP),))
    broken = validate(odd, replace(found, blocks=(found.blocks[0], moved, found.blocks[2])), CPU).broken
    assert broken is not None
    assert "saved input 0 is swapped, but block blocks.0 (call 0) saves it too" in broken
    smallest = plan(odd, int(odd.peak_bytes * 0.3), CPU).smallest_budget_bytes
    assert not plan(odd, smallest, CPU).blocks[1].inputs


def test_of_a_storage_swapped_in_part_the_rest_waits_in_a_buffer_of_its_own() -> None:
    trace = transformer(2, unit=1024, logits=40)
    plans = list(with_actions(trace, {}))
    size = 4 * 1024
    parts = (StorageAction(UP, size, Action.SWAP, 0.7), StorageAction(UP, size, Action.KEEP, 0.3))
    rest = tuple(a for a in plans[0].actions if a.index != UP)
    plans[0] = replace(plans[0], actions=(*rest, *parts))
    moved = 5 * 512  # 0.7 of 4096 bytes, rounded down to 512
    played = simulate(trace, plans, CPU)
    assert played.swapped_bytes == moved
    assert played.stall_seconds == pytest.approx(2 * moved / CPU.swap_out_bytes_per_second)
    assert played.peak_bytes == trace.peak_bytes - moved
    before, after = simulate(trace, (), CPU).moments, played.moments
    down = next(op.index for op in trace.ops if op.name == "down")  # what follows the last use in forward
    assert sum(after[down][1]) == sum(before[down][1]) - 1024 + size - moved, "both are there, before down's output"
    assert sum(after[down + 1][1]) == sum(before[down][1]) - moved


@pytest.mark.parametrize("rates", [CPU, GPU], ids=lambda r: r.name)
def test_allocations_are_what_the_timeline_counts(rates: Rates) -> None:
    trace = transformer(4, unit=1024)
    smallest = plan(trace, int(trace.peak_bytes * 0.3), rates).smallest_budget_bytes
    played = simulate(trace, plan(trace, smallest, rates).blocks, rates)
    assert played.moments
    for moment, (_, sizes) in enumerate(played.moments):
        live = sum(s.bytes for s in played.allocations if s.birth <= moment < s.death)
        assert live == sum(sizes)
