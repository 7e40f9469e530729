"""Plays a traced step with a plan's actions: every storage, every operation, every replay and copy, one after another.

The runtime's rules, as this simulation knows them:

- A kept storage lives as in the trace.
- Any other saved storage goes when forward's last operation that reads or writes it has run (as late as the block's
  backward begins: whoever else reads it in between keeps it).
- Copies without overlap hold up the step, out when the storage goes, in at its first need. With overlap they run on two
  links of their own; what a block swaps has left when the next block's forward ends, and its return is begun when the
  backward of the block behind it begins; whoever comes too early waits.
- A recomputed storage comes back at its first need by replaying the operations that it takes, back to what is kept or
  can be loaded; what that brings back on the way stays as long as another replay or its own backward will read it. The
  block's inputs stay until its last recomputed storage is gone, and so do the kept storages that its replay reads.
- A swapped input of a block goes when the block's forward is over and is back when its first replay begins.
- Of a storage that is swapped in part the rest moves to a buffer of its own: both are there from when forward lets go
  to when the swapped part has left, and again from when that begins to return until backward needs it.
- A compressed copy lives from the storage's birth to its death; the storage returns at its first need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from memopt.planner.compression import compressed_bytes
from memopt.planner.devices import Rates
from memopt.planner.validation.fates import Fate
from memopt.planner.validation.replay_model import ReplayModel
from memopt.planner.validation.simulation import Simulation
from memopt.planner.values import (
    Action,
    Block,
    BlockPlan,
    Category,
    Op,
    SavedStorage,
    Storage,
    StorageAction,
    Trace,
)


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
        self.held: dict[tuple[str, int], int] = {}
        self.since: dict[tuple[str, int], int] = {}
        self.by_category = dict.fromkeys(Category, 0)
        self.clock = self.out_free = self.in_free = 0.0
        self.away_bytes = 0
        self.saved: dict[int, Fate] = {}
        self.models: dict[int, ReplayModel] = {}
        self.held_until: dict[int, int] = {}
        self.rows: defaultdict[int, float] = defaultdict(float)
        self.moved_inputs: defaultdict[int, list[int]] = defaultdict(list)
        self.touches: defaultdict[int, list[int]] = defaultdict(list)
        for op in trace.ops:
            for storage in {*op.reads, *op.writes}:
                self.touches[storage].append(op.index)
        self.must_have_left: defaultdict[int, list[int]] = defaultdict(list)
        self.start_to_return: defaultdict[int, list[int]] = defaultdict(list)
        self.must_be_back: defaultdict[int, list[int]] = defaultdict(list)
        self._read_plans(plans)
        self._plan_replays()
        self._plan_copies()

    def _read_plans(self, plans: list[BlockPlan]) -> None:
        by_call = {(plan.path, plan.call): plan for plan in plans}
        for n, block in enumerate(self.trace.blocks):
            plan = by_call.get((block.path, block.call))
            if plan is None:
                continue
            self._read_fates(n, block.saved, plan.actions, 0)
            self._read_fates(n, block.saved_inputs, plan.inputs, block.forward[1])
            self.moved_inputs[n] = [s.storage for s in block.saved_inputs if s.storage in self.saved]

    def _read_fates(
        self, n: int, storages: tuple[SavedStorage, ...], actions: tuple[StorageAction, ...], earliest: int
    ) -> None:
        """What does not simply stay, and when forward lets go of it: not before ``earliest``."""
        fates: defaultdict[int, list[StorageAction]] = defaultdict(list)
        for action in actions:
            fates[action.index].append(action)
        for saved in storages:
            parts = tuple(fates[saved.index])
            if all(part.action is Action.KEEP for part in parts):
                continue
            uses = [op for op in self.touches[saved.storage] if op < self.trace.blocks[n].backward[0]]
            end = max(max(uses, default=0) + 1, earliest)
            self.saved[saved.storage] = Fate(n, saved.index, saved.dtype, parts, end)

    def _plan_replays(self) -> None:
        """What each block replays, and what must stay alive for it."""
        for n, block in enumerate(self.trace.blocks):
            own = {s.storage for s in block.saved}
            wanted = {s for s, saved in self.saved.items() if saved.block == n and saved.share(Action.RECOMPUTE)}
            if not wanted:
                continue
            model = self.models[n] = ReplayModel(self.trace, block, wanted, {s for s in own if self._feeds(s)})
            if model.unwritten:
                self._break(block, f"recomputes storage {min(model.unwritten)}, which none of its operations writes")
                continue
            for s in wanted:
                sources, ops = model.cone(s)
                for pinned in (*block.inputs, *sources):
                    self._hold_until(pinned, self.storages[s].death)
                for op in ops:  # where blocks run in tiles, the same rows of everything are recomputed
                    self.rows[op] = max(self.rows[op], self.saved[s].share(Action.RECOMPUTE))

    def _hold_until(self, storage: int, time: int) -> None:
        self.held_until[storage] = max(self.held_until.get(storage, self.storages[storage].death), time)

    def _feeds(self, storage: int) -> bool:
        """Whether a replay may read the saved bytes: kept, or copied without loss."""
        saved = self.saved.get(storage)
        return saved is None or not (saved.share(Action.RECOMPUTE) or saved.share(Action.COMPRESS))

    def play(self) -> Simulation:
        """One step, from the first operation to the last."""
        trace, seconds = self.trace, self.rates.seconds
        last = len(trace.ops)
        births, deaths, leaving = defaultdict(list), defaultdict(list), defaultdict(list)
        for storage in trace.storages:
            if storage.birth < storage.death and storage.birth < last:
                births[max(storage.birth, 0)].append(storage.id)
                deaths[self.held_until.get(storage.id, storage.death)].append(storage.id)
        for storage_id, saved in self.saved.items():
            leaving[saved.forward_end].append(storage_id)
        for op in trace.ops:
            self._release(deaths[op.index], leaving[op.index])
            self._copies(op.index)
            for read in op.reads:
                if read in self.saved and op.index >= trace.blocks[self.saved[read].block].backward[0]:
                    self._need(read, op)
            for born in births[op.index]:
                self._hold(("storage", born), born)
                if born in self.saved:
                    self.saved[born].present = True
                    if small := self._compressed(born, self.saved[born]):
                        self._hold(("copy", born), born, small)
            self._measure(op.index, op.name)
            spent = seconds(op.flops, op.bytes_read + op.bytes_written)
            self.clock += spent
            self.found.compute_seconds += spent
        for key in list(self.held):
            self._drop(key)
        return self.found

    def _release(self, dying: list[int], leaving: list[int]) -> None:
        for storage in dying:
            self._drop(("storage", storage))
            self._drop(("copy", storage))
            self._drop(("again", storage))
        for storage in leaving:
            self._leave(storage, self.saved[storage])

    def _leave(self, storage: int, saved: Fate) -> None:
        """Forward has let go of it."""
        size = self.storages[storage].bytes
        swapped = saved.swapped(size)
        saved.gone, saved.present = True, False
        small = self._compressed(storage, saved)
        if small:
            self._spend_codec(size + small)
        kept = saved.kept(size) + small
        if kept:
            self._hold(("copy", storage), storage, kept)
        if kept and swapped and not saved.tiled:
            self._measure(saved.forward_end, "a copy of what stays")
            swapped_until_left = size
        else:
            swapped_until_left = swapped
        self._resize(("storage", storage), storage, swapped_until_left if self.rates.overlap else 0)
        if swapped:
            copy = swapped / self.rates.swap_out_bytes_per_second
            self.found.swapped_bytes += swapped
            self.away_bytes += swapped
            self.found.host_bytes = max(self.found.host_bytes, self.away_bytes)
            if self.rates.overlap:
                self.out_free = saved.copied_at = max(self.clock, self.out_free) + copy
            else:
                self._wait(copy)

    def _compressed(self, storage: int, saved: Fate) -> int:
        """Bytes of its compressed copy."""
        total = 0
        for part in saved.parts:
            if part.action is Action.COMPRESS:
                covered = int(self.storages[storage].bytes * part.fraction)
                total += compressed_bytes(covered, saved.dtype, part.format or "8bit")
        return total

    def _copies(self, time: int) -> None:
        """Overlapped copies whose block boundary is now: those out must have ended, those in begin or must have."""
        for storage in self.must_have_left[time]:
            self._wait(self.saved[storage].copied_at - self.clock)
            self._resize(("storage", storage), storage, 0)
        for storage in self.start_to_return[time]:
            saved, size = self.saved[storage], self._swapped(storage)
            self._hold(("storage", storage), storage, size if saved.tiled else self.storages[storage].bytes)
            copy = size / self.rates.swap_in_bytes_per_second
            self.in_free = saved.back_at = max(self.clock, self.in_free, saved.copied_at) + copy
        for storage in self.must_be_back[time]:
            self._wait(self.saved[storage].back_at - self.clock)
            self.away_bytes -= self._swapped(storage)

    def _swapped(self, storage: int) -> int:
        return self.saved[storage].swapped(self.storages[storage].bytes)

    def _plan_copies(self) -> None:
        """Where overlapped copies must have ended and begin; a block with no other between has no time to swap."""
        blocks = self.trace.blocks
        for storage, saved in self.saved.items():
            block = blocks[saved.block]
            stop, back = block.forward[1], block.backward[0]
            next_ends = [b.forward[1] for b in blocks if b.forward[0] >= stop and b.forward[1] <= back]
            behind = [b.backward[0] for b in blocks if b.backward[0] >= stop and b.backward[1] <= back]
            if not self._swapped(storage) or not self.rates.overlap:
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
        size = self.storages[storage].bytes
        swapped = saved.swapped(size)
        if swapped and not self.rates.overlap:
            self._wait(swapped / self.rates.swap_in_bytes_per_second)
            self.away_bytes -= swapped
        for part in saved.parts:
            if part.action is Action.COMPRESS:
                self._spend_codec(size + self.held.get(("copy", storage), 0))
        if saved.share(Action.COMPRESS) or saved.share(Action.RECOMPUTE):
            again = int(size * saved.share(Action.RECOMPUTE))
            self._resize(("storage", storage), storage, max(0, size - saved.kept(size) - again))
            return
        self._resize(("storage", storage), storage, size)
        if saved.kept(size):
            self._measure(time, "a copy of what stayed")
            self._drop(("copy", storage))

    def _replay(self, storage: int, saved: Fate, op: Op) -> None:
        """Runs the operations that the storage takes, on the rows that are recomputed."""

        def load(source: int) -> None:
            other = self.saved.get(source)
            if other is not None and other.gone:
                self._return(source, other, op.index)

        for given in self.moved_inputs[saved.block]:
            load(given)

        def run(again: Op, made: list[int]) -> None:
            for new in made:
                rows = self.saved[new].share(Action.RECOMPUTE) if new in self.saved else 0.0
                self._hold(("again", new), new, int(self.storages[new].bytes * (rows or self.rows[again.index])))
            self._measure(op.index, f"replay of {again.name}")
            spent = self.rates.seconds(again.flops, again.bytes_read + again.bytes_written) * self.rows[again.index]
            self.clock += spent
            self.found.recompute_seconds += spent

        self.models[saved.block].need(storage, load, run, lambda old: self._drop(("again", old)))

    def _hold(self, key: tuple[str, int], storage: int, size: int | None = None) -> None:
        self._resize(key, storage, self.storages[storage].bytes if size is None else size)

    def _resize(self, key: tuple[str, int], storage: int, size: int) -> None:
        before, now = self.held.get(key, 0), len(self.found.moments)
        if size == before:
            return
        self.by_category[self.storages[storage].category] += size - before
        if before and self.since[key] < now:
            self.found.allocations.append(self._allocation(key, before, now))
        self.since[key] = now
        if size:
            self.held[key] = size
        else:
            self.held.pop(key, None)

    def _allocation(self, key: tuple[str, int], size: int, stop: int) -> Storage:
        storage = self.storages[key[1]]
        name = storage.name if key[0] == "storage" else f"{storage.name}, {key[0]}"
        number = len(self.found.allocations)
        return Storage(number, size, storage.category, self.since[key], stop, storage.producer, name)

    def _drop(self, key: tuple[str, int]) -> None:
        self._resize(key, key[1], 0)

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self.clock += seconds
            self.found.stall_seconds += seconds

    def _spend_codec(self, moved_bytes: int) -> None:
        spent = self.rates.seconds(0, moved_bytes)
        self.clock += spent
        self.found.compression_seconds += spent

    def _measure(self, index: int, name: str) -> None:
        sizes = tuple(self.by_category.values())
        self.found.moments.append((self.clock, sizes))
        total = sum(sizes)
        if total > self.found.peak_bytes:
            self.found.peak_bytes, self.found.peak_at, self.found.peak_index = total, name, index
            self.found.by_category = {category.value: size for category, size in self.by_category.items()}

    def _break(self, block: Block, what: str) -> None:
        if self.found.broken is None:
            self.found.broken = f"block {block.path} (call {block.call}) {what}"
