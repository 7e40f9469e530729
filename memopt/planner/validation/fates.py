"""What a plan makes of each saved storage in the simulation: its shares, when forward lets it go, where it is now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from memopt.planner.compression import compressed_bytes
from memopt.planner.values import Action, Block, BlockPlan, SavedStorage, StorageAction, Trace, moved_bytes


@dataclass
class Fate:
    """A saved storage of ``size`` bytes that does not simply stay: its fates, and where it is now.

    Attributes:
        block: the block call that saves it, by its place in the trace.
        given: whether it is one of the block's inputs.
        last_use: forward's last operation that reads or writes it, before which it is saved.
        forward_end: the first operation at which nobody but autograd holds it.
        source: whether replays read it, at any time until the last of them is over.
        present: whether backward finds it.
        gone: whether forward has let go of it.
        back_early: whether backward has got a second one, because somebody still held the first.
        copied_at, back_at: when an overlapped copy out or in has ended.
    """

    block: int
    index: int
    dtype: str
    parts: tuple[StorageAction, ...]
    size: int
    given: bool
    last_use: int
    forward_end: int
    source: bool = False
    present: bool = False
    gone: bool = False
    back_early: bool = False
    copied_at: float = 0.0
    back_at: float = 0.0

    def share(self, action: Action) -> float:
        """How much of it the action takes."""
        return sum(part.fraction for part in self.parts if part.action is action)

    @property
    def swapped(self) -> int:
        """Bytes that leave: of rows where the block runs in tiles, else as ``moved_bytes`` cuts them."""
        share = self.share(Action.SWAP)
        return int(self.size * share) if self.share(Action.RECOMPUTE) else moved_bytes(self.size, share)

    @property
    def kept(self) -> int:
        """Bytes of the share that stays, in a buffer of its own where the rest leaves."""
        share = self.share(Action.KEEP)
        whole = not share or self.share(Action.RECOMPUTE) or self.share(Action.COMPRESS)
        return int(self.size * share) if whole else self.size - self.swapped

    @property
    def compressed(self) -> int:
        """Bytes of its compressed copy."""
        parts = [part for part in self.parts if part.action is Action.COMPRESS]
        return sum(compressed_bytes(int(self.size * p.fraction), self.dtype, p.format or "8bit") for p in parts)

    @property
    def feeds(self) -> bool:
        """Whether a replay may read the saved bytes: kept, or copied without loss."""
        return not (self.share(Action.RECOMPUTE) or self.share(Action.COMPRESS))

    @property
    def tiled(self) -> bool:
        """Whether its parts are rows, each with a life of its own, and not bytes of one storage."""
        return bool(self.share(Action.RECOMPUTE)) and len(self.parts) > 1


def fates(trace: Trace, plans: Iterable[BlockPlan], touches: Mapping[int, Sequence[int]]) -> dict[int, Fate]:
    """The fates of all storages that do not simply stay, by id.

    Args:
        trace: the step.
        plans: its blocks'.
        touches: the operations that read or write each storage, in order.
    """
    by_call = {(plan.path, plan.call): plan for plan in plans}
    sizes = {storage.id: storage.bytes for storage in trace.storages}
    found: dict[int, Fate] = {}
    for n, block in enumerate(trace.blocks):
        plan = by_call.get((block.path, block.call))
        if plan is None:
            continue
        for given, saved, parts in _parts(block, plan):
            uses = [op for op in touches.get(saved.storage, ()) if op < block.backward[0]]
            last = max(uses, default=0)
            end = max(last + 1, saved.let_go, block.forward[1] if given else 0)
            found[saved.storage] = Fate(n, saved.index, saved.dtype, parts, sizes[saved.storage], given, last, end)
    return found


def _parts(block: Block, plan: BlockPlan) -> Iterator[tuple[bool, SavedStorage, tuple[StorageAction, ...]]]:
    """Each saved storage, or saved input, of which not everything is kept."""
    for given, storages, actions in ((False, block.saved, plan.actions), (True, block.saved_inputs, plan.inputs)):
        by_index: defaultdict[int, list[StorageAction]] = defaultdict(list)
        for action in actions:
            by_index[action.index].append(action)
        for saved in storages:
            parts = tuple(by_index[saved.index])
            if any(part.action is not Action.KEEP for part in parts):
                yield given, saved, parts
