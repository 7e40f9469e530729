"""From a trace to the policy problem: the choices for each saved storage, and the positions to check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from memopt.planner.devices import Rates
from memopt.planner.problem.actions import Site, choices_at
from memopt.planner.problem.early import early_returns
from memopt.planner.problem.inputs import movable_inputs
from memopt.planner.problem.positions import positions
from memopt.planner.problem.replaying import Replay, is_steady, replays
from memopt.planner.problem.statement import BlockItems, Item, Milestone, Moments, Problem, Resource, held_at
from memopt.planner.values import Action, Block, Category, SavedStorage, Storage, Trace

DIVISIBLE_SHARE = 0.1  # of a block's saved bytes: smaller storages leave whole or not at all


def op_seconds(trace: Trace, rates: Rates) -> list[float]:
    """Roofline seconds of every operation."""
    return [rates.seconds(op.flops, op.bytes_read + op.bytes_written) for op in trace.ops]


def moments(trace: Trace) -> list[Moments]:
    """Each block call's moments; a swap has one neighbouring block's time in each direction to be done in."""
    found = []
    for block in trace.blocks:
        stop, back = block.forward[1], block.backward[0]
        ends = [b.forward[1] for b in trace.blocks if b.forward[0] >= stop and b.forward[1] <= back]
        starts = [b.backward[0] for b in trace.blocks if stop <= b.backward[0] and b.backward[1] <= back]
        found.append(Moments(stop, min(ends, default=back), max(starts, default=stop), back))
    return found


class Builder:
    """Collects variables while walking through the blocks of one trace."""

    def __init__(self, trace: Trace, rates: Rates, actions: frozenset[Action], saved_limit: int = 0) -> None:
        self.trace, self.rates, self.actions, self.saved_limit = trace, rates, actions, saved_limit
        self.storages: dict[int, Storage] = {storage.id: storage for storage in trace.storages}
        self.births = {storage.id: storage.birth for storage in trace.storages}
        self.seconds = op_seconds(trace, rates)
        self.touches = self._touches()
        self.variables = 0
        self.managed: set[int] = set()
        counts = Counter(saved.storage for block in trace.blocks for saved in (*block.saved, *block.saved_inputs))
        self.shared_between_blocks = {storage for storage, count in counts.items() if count > 1}
        self.movable_inputs = movable_inputs(trace)
        self.moments = moments(trace)

    def _touches(self) -> dict[int, list[int]]:
        """The operations that read or write each storage, in order."""
        touches: dict[int, list[int]] = {}
        for op in self.trace.ops:
            for storage in {*op.reads, *op.writes}:
                touches.setdefault(storage, []).append(op.index)
        return touches

    def number(self) -> int:
        """The next variable."""
        self.variables += 1
        return self.variables - 1

    def block(self, position: int) -> BlockItems:
        """The items of one block call."""
        block = self.trace.blocks[position]
        steady = is_steady(self.trace, block)
        movable = [saved for saved in block.saved if steady and self._is_movable(block, saved)]
        divided = DIVISIBLE_SHARE * sum(saved.bytes for saved in block.saved)
        found = replays(self.trace, block, self.births)
        shared = self._shared(movable, found)
        pins = self._pins(block, movable)
        items = []
        for saved in movable:
            replay = found[saved.storage]
            cost, needs = self._replay_cost(replay, shared, pins)
            site = self._site(position, saved, cost, needs, saved.bytes >= divided)
            drafts = choices_at(site, self.actions)
            if len(drafts) < 2:
                continue
            choices = tuple(replace(choice, variable=self.number()) for choice in drafts)
            self.managed.add(saved.storage)
            reading = [o.index for o in movable if o is not saved and saved.storage in _reads(found[o.storage])]
            extra = self._transient_bytes(block, replay) if replay is not None else 0
            items.append(
                Item(saved.index, saved.bytes, saved.token_wise, choices, tuple(reading), site.first_need, extra)
            )
        if steady:
            readers = [i.index for i in items if any(c.action is Action.RECOMPUTE for c in i.choices)]
            items += self._inputs(position, readers)
        early, together = early_returns(items, self.number, self.rates.overlap)
        resources = (*shared.values(), *pins, *early)
        quiet = self._quiet(position, items, resources)
        return BlockItems(position, block.group, tuple(items), resources, together, self.moments[position], quiet)

    def _inputs(self, position: int, readers: list[int]) -> list[Item]:
        """The block's saved inputs; a swapped one is back when the block's first replay begins."""
        block = self.trace.blocks[position]
        items = []
        for saved in self.movable_inputs[position]:
            if saved.bytes <= self.saved_limit:
                continue
            site = self._site(position, saved, None, (), divisible=False)
            drafts = choices_at(site, self.actions & {Action.KEEP, Action.SWAP})
            if len(drafts) > 1:
                choices = tuple(replace(choice, variable=self.number()) for choice in drafts)
                self.managed.add(saved.storage)
                index = len(block.saved) + saved.index
                items.append(Item(index, saved.bytes, False, choices, tuple(readers), site.first_need, 0))
        return items

    def _transient_bytes(self, block: Block, replay: Replay) -> int:
        """The most that a replay writes beside saved storages at any of its operations."""
        saved = {s.storage for s in block.saved}
        written = {v for op in replay.ops for v in self.trace.ops[op].writes} - saved
        local = [self.storages[v] for v in written if self.storages[v].birth >= block.forward[0]]
        return max(sum(s.bytes for s in local if s.birth <= op < s.death) for op in replay.ops)

    def _is_movable(self, block: Block, saved: SavedStorage) -> bool:
        """Storages that other blocks hold too, that were made outside the block or that are tiny stay as they are."""
        inside = block.forward[0] <= self.storages[saved.storage].birth < block.forward[1]
        return inside and saved.storage not in self.shared_between_blocks and saved.bytes > self.saved_limit

    def _shared(self, movable: list[SavedStorage], found: dict[int, Replay | None]) -> dict[int, Resource]:
        """Operations that several replays share, by their index."""
        if Action.RECOMPUTE not in self.actions:
            return {}
        usable = [found[saved.storage] for saved in movable]
        counts = Counter(op for replay in usable if replay is not None for op in replay.ops)
        wanted = sorted(op for op, count in counts.items() if count > 1 and self.seconds[op] > 0)
        return {op: Resource(self.number(), self.seconds[op], ()) for op in wanted}

    def _pins(self, block: Block, movable: list[SavedStorage]) -> list[Resource]:
        """The block's inputs, which stay until nothing is left to recompute, where they would go before."""
        if Action.RECOMPUTE not in self.actions:
            return []
        last = max((self.storages[saved.storage].death for saved in movable), default=0)
        pinned = [self.storages[v] for v in block.inputs if self.storages[v].category is not Category.WEIGHTS]
        return [Resource(self.number(), 0.0, ((s.death, last, s.bytes),), s.bytes) for s in pinned if s.death < last]

    def _replay_cost(
        self, replay: Replay | None, shared: dict[int, Resource], pins: list[Resource]
    ) -> tuple[float | None, tuple[int, ...]]:
        if replay is None:
            return None, ()
        cost = sum(self.seconds[op] for op in replay.ops if op not in shared)
        needs = [shared[op].variable for op in replay.ops if op in shared]
        return cost, (*needs, *(pin.variable for pin in pins))

    def _site(
        self, position: int, saved: SavedStorage, cost: float | None, needs: tuple[int, ...], divisible: bool
    ) -> Site:
        storage, times = self.storages[saved.storage], self.moments[position]
        touches = self.touches.get(saved.storage, [])
        forward = [op for op in touches if op < times.backward_start]
        backward = [op for op in touches if op >= times.backward_start]
        last = max(forward, default=storage.birth)
        end = max(last + 1, saved.let_go)
        if storage.birth < self.trace.blocks[position].forward[0]:  # an input
            end = max(end, times.forward_stop)
            last = end - 1
        return Site(
            bytes=saved.bytes,
            dtype=saved.dtype,
            birth=storage.birth,
            last_use=last,
            forward_end=end,
            first_need=min(backward, default=storage.death),
            death=storage.death,
            leave=times.leave,
            arrive=times.arrive,
            lead_seconds=sum(self.seconds[end : times.forward_stop]),
            replay_seconds=cost,
            replay_needs=needs,
            rates=self.rates,
            divisible=divisible,
        )

    def _quiet(self, position: int, items: list[Item], resources: tuple[Resource, ...]) -> tuple[int, int]:
        """The longest stretch between forward and backward in which each choice holds just its held bytes."""
        times = self.moments[position]
        edges = {times.forward_stop, times.backward_start}
        for choice in (choice for item in items for choice in item.choices):
            edges |= {edge for span in choice.spans for edge in span[:2]}
        edges |= {edge for resource in resources for span in resource.spans for edge in span[:2]}
        ordered = sorted(edge for edge in edges if times.forward_stop <= edge <= times.backward_start)
        best = (times.forward_stop, times.forward_stop)
        for start, stop in pairwise(ordered):
            plain = all(held_at(c.spans, start) == c.held_bytes for item in items for c in item.choices)
            plain = plain and all(held_at(r.spans, start) == r.held_bytes for r in resources)
            if plain and stop - start > best[1] - best[0]:
                best = (start, stop)
        return best


def _reads(replay: Replay | None) -> frozenset[int]:
    return replay.saved_reads if replay is not None else frozenset()


def milestones(trace: Trace, seconds: list[float]) -> tuple[Milestone, ...]:
    """The ends of the blocks' forwards and the starts of their backwards, with the compute time up to each."""
    times = sorted({b.forward[1] for b in trace.blocks} | {b.backward[0] for b in trace.blocks})
    found, start = [], 0
    for time in times:
        found.append(Milestone(time, sum(seconds[start:time])))
        start = time
    return tuple(found)


def build(trace: Trace, rates: Rates, actions: Iterable[Action], saved_limit: int = 0) -> Problem:
    """Write down the policy problem of a trace on a device, with a budget of nothing: ``within`` sets another.

    Args:
        trace: the step.
        rates: the device.
        actions: what the policy may do; keeping is always among it.
        saved_limit: saved storages of at most so many bytes are kept without asking.
    """
    builder = Builder(trace, rates, frozenset(actions) | {Action.KEEP}, saved_limit)
    blocks = tuple(builder.block(position) for position in range(len(trace.blocks)))
    return Problem(
        blocks=blocks,
        positions=positions(trace, blocks, builder.managed),
        milestones=milestones(trace, builder.seconds),
        rates=rates,
        budget_bytes=0,
        compute_seconds=sum(builder.seconds),
        variables=builder.variables,
    )
