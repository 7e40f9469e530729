"""Plays a traced step with a plan's actions: every storage, every operation, every replay and copy, one after another.

The runtime's rules, as this simulation knows them:

- A kept storage lives as in the trace.
- Any other saved storage goes when nobody but autograd holds it: a local variable, or whoever reads it, keeps it so
  long. Where that is longer than until backward needs it, what comes back is a second one.
- Copies without overlap hold up the step, out when the storage goes, in at its first need. With overlap they run on two
  links of their own; what a block swaps has left when the next block's forward ends, and its return is begun when the
  backward of the block behind it begins; whoever comes too early waits.
- A recomputed storage comes back at its first need by replaying the operations that it takes, back to what is kept or
  can be loaded; what that brings back on the way stays as long as another replay or its own backward will read it. The
  block's inputs stay until its last recomputed storage is gone, and so do the kept storages that its replay reads.
- What a block with something to recompute overwrites of the outside (running statistics, an input) is copied before,
  where a replay would read it, until its last recomputed storage is gone.
- A swapped input of a block goes when the block's forward is over and is back when its first replay begins.
- Of a storage that is swapped in part the rest moves to a buffer of its own: both are there from when forward lets go
  to when the swapped part has left, and again from when that begins to return until backward needs it.
- A compressed copy lives from the storage's birth to its death; the storage returns at its first need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from memopt.planner.devices import Rates
from memopt.planner.validation.fates import Fate, fates
from memopt.planner.validation.ledger import Key, Ledger
from memopt.planner.validation.replay_model import ReplayModel, Value
from memopt.planner.validation.simulation import Simulation
from memopt.planner.values import Action, Block, BlockPlan, Op, Trace


def simulate(trace: Trace, plans: Iterable[BlockPlan], rates: Rates) -> Simulation:
    """Play the step; storages that no plan names are kept.

    Returns:
        The simulation; ``broken`` says, where something cannot be carried out, what.
    """
    player = _Player(trace, list(plans), rates)
    return player.found if player.found.broken else player.play()


class _Player:
    def __init__(self, trace: Trace, plans: list[BlockPlan], rates: Rates) -> None:
        self.trace, self.rates, self.found = trace, rates, Simulation()
        self.storages = {storage.id: storage for storage in trace.storages}
        self.ledger = Ledger(self.storages, self.found)
        self.clock = self.out_free = self.in_free = 0.0
        self.away_bytes = 0
        touches: defaultdict[int, list[int]] = defaultdict(list)
        for op in trace.ops:
            for storage in {*op.reads, *op.writes}:
                touches[storage].append(op.index)
        self.saved = fates(trace, plans, touches)
        self.models: dict[int, ReplayModel] = {}
        self.held_until: dict[int, int] = {}
        self.rows: defaultdict[int, float] = defaultdict(float)
        self.copied: defaultdict[int, list[Key]] = defaultdict(list)
        self.copies_end: defaultdict[int, list[Key]] = defaultdict(list)
        self.must_have_left: defaultdict[int, list[int]] = defaultdict(list)
        self.start_to_return: defaultdict[int, list[int]] = defaultdict(list)
        self.must_be_back: defaultdict[int, list[int]] = defaultdict(list)
        self._plan_replays()
        self._plan_copies()

    def _plan_replays(self) -> None:
        """What each block replays, and what must stay alive for it."""
        for n, block in enumerate(self.trace.blocks):
            wanted = {s for s, saved in self.saved.items() if saved.block == n and saved.share(Action.RECOMPUTE)}
            if not wanted:
                continue
            exact = {s.storage for s in block.saved if s.storage not in self.saved or self.saved[s.storage].feeds}
            model = self.models[n] = ReplayModel(self.trace, block, wanted, exact)
            if model.unwritten:
                self._break(block, f"recomputes storage {min(model.unwritten)}, which none of its operations writes")
                continue
            for s in wanted:
                sources, ops = model.cone(s)
                for source in sources & self.saved.keys():
                    self.saved[source].source = True
                for pinned in (*block.inputs, *sources):
                    self._hold_until(pinned, self.storages[s].death)
                for op in ops:  # where blocks run in tiles, the same rows of everything are recomputed
                    self.rows[op] = max(self.rows[op], self.saved[s].share(Action.RECOMPUTE))
            copies: list[Key] = [(f"as block call {n} found it", s) for s in model.copies()]
            self.copied[block.forward[0]] += copies
            self.copies_end[max(self.storages[s].death for s in wanted)] += copies

    def _hold_until(self, storage: int, time: int) -> None:
        self.held_until[storage] = max(self.held_until.get(storage, self.storages[storage].death), time)

    def play(self) -> Simulation:
        """One step, from the first operation to the last."""
        trace, seconds = self.trace, self.rates.seconds
        last = len(trace.ops)
        births, deaths, leaving, split = (defaultdict[int, list[int]](list) for _ in range(4))
        for storage in trace.storages:
            if storage.birth < storage.death and storage.birth < last:
                births[max(storage.birth, 0)].append(storage.id)
                deaths[self.held_until.get(storage.id, storage.death)].append(storage.id)
        for storage_id, saved in self.saved.items():
            if saved.forward_end < self.storages[storage_id].death:
                leaving[saved.forward_end].append(storage_id)
                if saved.kept and saved.swapped and not saved.tiled:
                    split[saved.forward_end - 1 if saved.given else saved.last_use].append(storage_id)
        for op in trace.ops:
            self._release(deaths[op.index], leaving[op.index])
            for copy in self.copies_end[op.index]:
                self.ledger.drop(copy)
            for copy in self.copied[op.index]:
                self.ledger.hold(copy)
            self._copies(op.index)
            for read in op.reads:
                if read in self.saved and op.index >= trace.blocks[self.saved[read].block].backward[0]:
                    self._need(read, op)
            for born in births[op.index]:
                self.ledger.hold(("storage", born))
                if born in self.saved:
                    self.saved[born].present = True
                    if small := self.saved[born].compressed:
                        self.ledger.hold(("copy", born), small)
            for apart in split[op.index]:
                self.ledger.hold(("copy", apart), self.saved[apart].kept + self.saved[apart].compressed)
            self._measure(op.index, op.name)
            spent = seconds(op.flops, op.bytes_read + op.bytes_written)
            self.clock += spent
            self.found.compute_seconds += spent
        self.ledger.close()
        return self.found

    def _release(self, dying: list[int], leaving: list[int]) -> None:
        for storage in dying:
            self.ledger.drop(("storage", storage))
            self.ledger.drop(("copy", storage))
            saved = self.saved.get(storage)
            if saved is not None and saved.share(Action.RECOMPUTE):
                self.models[saved.block].done(storage, self._drop_value)
            else:
                self.ledger.drop(("again", storage))
        for storage in leaving:
            self._leave(storage, self.saved[storage])

    def _leave(self, storage: int, saved: Fate) -> None:
        """Forward has let go of it."""
        if saved.back_early:
            self.ledger.drop(("storage", storage))
            return
        small, kept, swapped = saved.compressed, saved.kept + saved.compressed, saved.swapped
        saved.gone, saved.present = True, False
        if small:
            self._spend_codec(saved.size + small)
        if kept:
            self.ledger.hold(("copy", storage), kept)
        if kept and swapped and not saved.tiled:
            self._measure(saved.forward_end, "a copy of what stays")
            swapped_until_left = saved.size
        else:
            swapped_until_left = swapped
        self.ledger.hold(("storage", storage), swapped_until_left if self.rates.overlap else 0)
        if swapped:
            copy = swapped / self.rates.swap_out_bytes_per_second
            self.found.swapped_bytes += swapped
            self.away_bytes += swapped
            self.found.host_bytes = max(self.found.host_bytes, self.away_bytes)
            if self.rates.overlap:
                self.out_free = saved.copied_at = max(self.clock, self.out_free) + copy
            else:
                self._wait(copy)

    def _copies(self, time: int) -> None:
        """Overlapped copies whose block boundary is now: those out must have ended, those in begin or must have."""
        for storage in self.must_have_left[time]:
            self._wait(self.saved[storage].copied_at - self.clock)
            self.ledger.drop(("storage", storage))
        for storage in self.start_to_return[time]:
            saved = self.saved[storage]
            self.ledger.hold(("storage", storage), saved.swapped if saved.tiled else saved.size)
            copy = saved.swapped / self.rates.swap_in_bytes_per_second
            self.in_free = saved.back_at = max(self.clock, self.in_free, saved.copied_at) + copy
        for storage in self.must_be_back[time]:
            self._wait(self.saved[storage].back_at - self.clock)
            self.away_bytes -= self.saved[storage].swapped

    def _plan_copies(self) -> None:
        """Where overlapped copies must have ended and begin; a block with no other between has no time to swap."""
        blocks = self.trace.blocks
        for storage, saved in self.saved.items():
            block = blocks[saved.block]
            stop, back = block.forward[1], block.backward[0]
            next_ends = [b.forward[1] for b in blocks if b.forward[0] >= stop and b.forward[1] <= back]
            behind = [b.backward[0] for b in blocks if b.backward[0] >= stop and b.backward[1] <= back]
            if not saved.swapped or not self.rates.overlap:
                continue
            if not next_ends or not behind:
                self._break(block, "swaps, but no other block runs in the meantime")
                continue
            self.must_have_left[max(min(next_ends), saved.forward_end)].append(storage)
            self.start_to_return[max(behind)].append(storage)
            self.must_be_back[back].append(storage)

    def _need(self, storage: int, op: Op) -> None:
        """Backward reads a saved storage."""
        saved = self.saved[storage]
        if saved.present and not (saved.gone or saved.back_early):
            # Somebody else holds it still, but autograd has only what the plan left it.
            saved.back_early = True
            self.ledger.hold(("again", storage))
        if saved.present or not saved.gone:
            return
        if saved.share(Action.RECOMPUTE):
            self._replay(storage, saved, op)
        self._return(storage, saved, op.index)

    def _return(self, storage: int, saved: Fate, time: int) -> None:
        """Brings back what was swapped or compressed."""
        if saved.present:
            return
        saved.present = True
        swapped, kept = saved.swapped, saved.kept
        if swapped and not self.rates.overlap:
            self._wait(swapped / self.rates.swap_in_bytes_per_second)
            self.away_bytes -= swapped
        for part in saved.parts:
            if part.action is Action.COMPRESS:
                self._spend_codec(saved.size + self.ledger.held.get(("copy", storage), 0))
        if saved.share(Action.COMPRESS) or saved.share(Action.RECOMPUTE):
            again = int(saved.size * saved.share(Action.RECOMPUTE))
            self.ledger.hold(("storage", storage), max(0, saved.size - kept - again))
            return
        self.ledger.hold(("storage", storage), saved.size)
        if kept:
            self._measure(time, "a copy of what stayed")
            if not saved.source:
                self.ledger.drop(("copy", storage))

    def _replay(self, storage: int, saved: Fate, op: Op) -> None:
        """Runs the operations that the storage takes, on the rows that are recomputed."""

        def load(source: int) -> None:
            other = self.saved.get(source)
            if other is not None and other.gone:
                self._return(source, other, op.index)

        for given, other in self.saved.items():
            if other.given and other.block == saved.block:
                load(given)

        def run(again: Op, made: list[Value]) -> None:
            for value in made:
                new = value[0]
                rows = self.saved[new].share(Action.RECOMPUTE) if new in self.saved else 0.0
                self.ledger.hold(_key(value), int(self.storages[new].bytes * (rows or self.rows[again.index])))
            self._measure(op.index, f"replay of {again.name}")
            spent = self.rates.seconds(again.flops, again.bytes_read + again.bytes_written) * self.rows[again.index]
            self.clock += spent
            self.found.recompute_seconds += spent

        self.models[saved.block].need(storage, load, run, self._drop_value)

    def _drop_value(self, value: Value) -> None:
        self.ledger.drop(_key(value))

    def _measure(self, index: int, name: str) -> None:
        self.ledger.measure(self.clock, index, name)

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self.clock += seconds
            self.found.stall_seconds += seconds

    def _spend_codec(self, moved_bytes: int) -> None:
        spent = self.rates.seconds(0, moved_bytes)
        self.clock += spent
        self.found.compression_seconds += spent

    def _break(self, block: Block, what: str) -> None:
        if self.found.broken is None:
            self.found.broken = f"block {block.path} (call {block.call}) {what}"


def _key(value: Value) -> Key:
    """What a replay's value is held under."""
    storage, version = value
    return f"again, written {version} times" if version else "again", storage
