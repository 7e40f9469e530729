"""A vocabulary split over ranks: rank r holds some consecutive rows of the weight, every rank all rows of ``hidden``.

Each rank reduces its own logits; the maxima, sums and target logits of a chunk are merged by two all-reduces of a few
numbers per row. Without a process group everything here is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NO_ENTRY = 2**62


@dataclass(frozen=True)
class Shard:
    """The part of the vocabulary held here: entries ``first`` to ``first + V`` of ``total``; ``largest`` V of any."""

    first: int
    total: int
    largest: int
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, group: ProcessGroup | None, V: int, device: torch.device) -> Shard:
        if group is None:
            return cls(0, V, V)
        import torch.distributed as dist

        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        rank = dist.get_rank(group)
        sizes[rank] = V
        dist.all_reduce(sizes, group=group)
        return cls(int(sizes[:rank].sum()), int(sizes.sum()), int(sizes.max()), group)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.group is not None:
            import torch.distributed as dist

            dist.all_reduce(values, group=self.group)
        return values

    def merge(self, statistics: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor]:
        """(5, R) statistics and (R,) argmax of each rank's entries to those of the whole vocabulary."""
        if self.group is None:
            return statistics, argmax
        import torch.distributed as dist

        highest = statistics[0].clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        below = torch.where(statistics[0] == highest, 0.0, statistics[0] - highest)
        shrink = below.exp()
        moved = torch.where(shrink > 0, statistics[2] + statistics[1] * below, 0.0)
        sums = torch.stack([statistics[1] * shrink, moved * shrink, *statistics[3:]])
        dist.all_reduce(sums, group=self.group)
        entry = torch.where(statistics[0] == highest, argmax + self.first, _NO_ENTRY)
        dist.all_reduce(entry, op=dist.ReduceOp.MIN, group=self.group)
        return torch.cat([highest.unsqueeze(0), sums]), entry
