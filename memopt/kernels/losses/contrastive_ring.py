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
    """What a rank has in its hands during one step, in a fixed order with fixed shapes on every rank."""

    tensors: list[Tensor]


@dataclass(frozen=True)
class Ring:
    """The ranks of a process group, or this process alone."""

    group: ProcessGroup | None

    @property
    def size(self) -> int:
        if self.group is None:
            return 1
        import torch.distributed as dist

        return dist.get_world_size(self.group)

    def sum_(self, value: Tensor) -> Tensor:
        if self.group is not None:
            import torch.distributed as dist

            dist.all_reduce(value, group=self.group)
        return value

    def pass_on(self, visitor: Visitor) -> Visitor:
        """Sends to the next rank and receives from the one before; every rank must take part."""
        size = self.size
        if size == 1:
            return visitor
        import torch.distributed as dist

        assert self.group is not None
        rank = dist.get_rank(self.group)
        onward = dist.get_global_rank(self.group, (rank + 1) % size)
        back = dist.get_global_rank(self.group, (rank - 1) % size)
        sent = [tensor.contiguous() for tensor in visitor.tensors]
        received = [torch.empty_like(tensor) for tensor in sent]
        operations = [dist.P2POp(dist.isend, tensor, onward, self.group) for tensor in sent]
        operations += [dist.P2POp(dist.irecv, tensor, back, self.group) for tensor in received]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        return Visitor(received)
