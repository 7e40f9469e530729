"""What becomes of one saved storage in the simulation: its shares, and where they are now."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.planner.values import Action, StorageAction, moved_bytes


@dataclass
class Fate:
    """A saved storage that does not simply stay: its fates, and where it is now."""

    block: int
    index: int
    dtype: str
    parts: tuple[StorageAction, ...]
    forward_end: int
    present: bool = False
    gone: bool = False
    copied_at: float = 0.0
    back_at: float = 0.0

    def share(self, action: Action) -> float:
        return sum(part.fraction for part in self.parts if part.action is action)

    def swapped(self, size: int) -> int:
        """Bytes that leave: of rows where the block runs in tiles, else as ``moved_bytes`` cuts them."""
        share = self.share(Action.SWAP)
        return int(size * share) if self.share(Action.RECOMPUTE) else moved_bytes(size, share)

    def kept(self, size: int) -> int:
        """Bytes of the share that stays, in a buffer of its own where the rest leaves."""
        share = self.share(Action.KEEP)
        whole = not share or self.share(Action.RECOMPUTE) or self.share(Action.COMPRESS)
        return int(size * share) if whole else size - self.swapped(size)

    @property
    def tiled(self) -> bool:
        """Whether its parts are rows, each with a life of its own, and not bytes of one storage."""
        return bool(self.share(Action.RECOMPUTE)) and len(self.parts) > 1
