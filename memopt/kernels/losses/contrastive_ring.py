"""Tensors that travel round a ring of ranks: each step to the next one, and home after as many steps as ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Visitor:
    """What a rank has in its hands during one step, in a fixed order on every rank.

    The first dimension of every tensor is the number of pairs of the rank that is its home.
    """

    tensors: list[Tensor]
    home: int


@dataclass(frozen=True)
class Ring:
    """The ranks of a process group, or this process alone; ``counts`` are the pairs of each."""

    counts: tuple[int, ...]
    rank: int = 0
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, group: ProcessGroup | None, keys: Tensor) -> Ring:
        """Asks every rank for its shape; ValueError, on all of them, where widths differ."""
        if group is None:
            return cls((keys.shape[0],))
        import torch.distributed as dist

        shapes = torch.zeros(dist.get_world_size(group), 2, dtype=torch.int64, device=keys.device)
        rank = dist.get_rank(group)
        shapes[rank] = torch.tensor(keys.shape)
        dist.all_reduce(shapes, group=group)
        counts, widths = shapes.t().tolist()
        if len(set(widths)) > 1:
            raise ValueError(f"queries and keys must have one width on all ranks, got {widths} by rank")
        return cls(tuple(counts), rank, group)

    @property
    def size(self) -> int:
        return len(self.counts)

    @property
    def pairs(self) -> int:
        return sum(self.counts)

    def visitor(self, *tensors: Tensor) -> Visitor:
        """These tensors of this rank, about to travel."""
        return Visitor(list(tensors), self.rank)

    def sum_(self, value: Tensor) -> Tensor:
        if self.group is not None:
            import torch.distributed as dist

            dist.all_reduce(value, group=self.group)
        return value

    def pass_on(self, visitor: Visitor) -> Visitor:
        """Sends to the next rank and receives from the one before; every rank must take part."""
        if self.group is None or self.size == 1:
            return visitor
        import torch.distributed as dist

        home = (visitor.home - 1) % self.size
        onward = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        back = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        sent = [tensor.contiguous() for tensor in visitor.tensors]
        received = [tensor.new_empty(self.counts[home], *tensor.shape[1:]) for tensor in sent]
        # Nothing travels for a rank without pairs.
        operations = [dist.P2POp(dist.isend, tensor, onward, self.group) for tensor in sent if tensor.numel()]
        operations += [dist.P2POp(dist.irecv, tensor, back, self.group) for tensor in received if tensor.numel()]
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        return Visitor(received, home)
