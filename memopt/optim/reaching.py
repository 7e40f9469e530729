"""Flat sharded parameters whose parts on the ranks are no whole blocks: what each rank works on instead of its part.

A block's scale is that of all its elements, and its codes are written by whoever knows them all. Of element-wise rules
each rank works on a :class:`Share`: the blocks that begin in its part, so that states are shared as the parameter is.
The elements by which shares and parts differ, fewer than a block at either end, change hands before and after a step.
Rules that look at whole parameters, and parameters cut in another way, work on the :class:`Whole` on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from memopt.optim import sharding
from memopt.optim.layout import Extent

Cuts = tuple[int, ...]
"""Where each rank's part of something flat begins, and the end of the last: part ``r`` is from ``r`` to ``r + 1``."""


class Reach(Protocol):
    """What a rank works on in the place of its part of ``param``: something that is no DTensor."""

    @property
    def param(self) -> Tensor:
        """The sharded parameter."""

    @property
    def extent(self) -> Extent:
        """What decides how its states are kept."""

    @property
    def offset(self) -> int:
        """Index, in the flattened whole parameter, of the first element worked on."""

    def fetch(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The values to work on and their gradients, as new tensors. All ranks must take part."""

    def put_back(self, values: Tensor) -> None:
        """Write new values into the ranks' parts. All ranks must take part."""

    def kept(self, saved: Tensor, whole: Sequence[int], block: int) -> Tensor:
        """Of a saved state what is kept here; as it is where it has not the shape of the ``whole`` state.

        ``block`` is how many of its elements belong to a block of the parameter. All ranks must take part.
        """

    def shown(self, held: Tensor, whole: Sequence[int], block: int) -> Tensor:
        """A state kept here as a state dict shows it; see :meth:`kept`. All ranks must take part."""


@dataclass(frozen=True)
class Whole:
    """Every rank works on a gathered copy of the whole parameter, and keeps its whole states."""

    param: Tensor
    offset: int = 0

    @property
    def extent(self) -> Extent:
        return Extent(tuple(self.param.shape), tuple(self.param.shape))

    def fetch(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return sharding.gather(self.param), sharding.gather(grad)

    def put_back(self, values: Tensor) -> None:
        sharding.scatter(values, self.param)

    def kept(self, saved: Tensor, whole: Sequence[int], block: int) -> Tensor:
        return sharding.gather(saved) if sharding.is_sharded(saved) else saved.detach()

    def shown(self, held: Tensor, whole: Sequence[int], block: int) -> Tensor:
        return held


@dataclass(frozen=True)
class Share:
    """The blocks of the flattened parameter that begin in this rank's part.

    Args:
        param: the parameter, sharded by its first dimension over ``group``.
        block: elements of a block.
        group: the ranks that share it.
        rank: this one's number among them.
        cuts: where the parameter's parts begin.
    """

    param: Tensor
    block: int
    group: dist.ProcessGroup
    rank: int
    cuts: Cuts

    @property
    def worked(self) -> Cuts:
        """Where shares begin: at the first block that begins in the part."""
        return tuple(min(-(-cut // self.block) * self.block, self.cuts[-1]) for cut in self.cuts)

    @property
    def offset(self) -> int:
        return self.worked[self.rank]

    @property
    def extent(self) -> Extent:
        return Extent((self.cuts[-1],), (self.worked[self.rank + 1] - self.offset,))

    def fetch(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        one = cast(Any, self.param)
        if sharding.is_sharded(grad) and cast(Any, grad).placements != one.placements:
            grad = cast(Any, grad).redistribute(one.device_mesh, one.placements)
        parts = [sharding.local_of(tensor).reshape(-1) for tensor in (self.param, grad)]
        values, gradients = recut(parts, self.cuts, self.worked, self.rank, self.group)
        return values, gradients

    def put_back(self, values: Tensor) -> None:
        local = sharding.local_of(self.param)
        (part,) = recut([values], self.worked, self.cuts, self.rank, self.group)
        local.copy_(part.view(local.shape))

    def kept(self, saved: Tensor, whole: Sequence[int], block: int) -> Tensor:
        if tuple(saved.shape) != tuple(whole):
            return saved.detach()
        full = sharding.gather(saved) if sharding.is_sharded(saved) else saved.detach()
        begin, end = self._worked(full.numel(), block)[self.rank : self.rank + 2]
        return full.reshape(-1)[begin:end]

    def shown(self, held: Tensor, whole: Sequence[int], block: int) -> Tensor:
        shape = tuple(whole)
        after = parts_of(shape, len(self.cuts) - 1)
        (part,) = recut([held], self._worked(after[-1], block), after, self.rank, self.group)
        return sharding.like(self.param, part.view(-1, *shape[1:]), shape, cut=True)

    def _worked(self, length: int, block: int) -> Cuts:
        """Where shares of a state begin that has ``block`` elements for every block of the parameter."""
        return tuple(min(-(-cut // self.block) * block, length) for cut in self.cuts)


def reach_of(param: Tensor, block: int, *, elementwise: bool) -> Reach:
    """What a rank works on in the place of its part of a flat sharded parameter with ``block`` elements per scale."""
    cut = sharding.cut_by_rows(param) if elementwise else None
    if cut is None:
        return Whole(param)
    group, rank = cut
    return Share(param, block, group, rank, parts_of(tuple(param.shape), group.size()))


def parts_of(shape: tuple[int, ...], ranks: int) -> Cuts:
    """How torch cuts a tensor by its first dimension: equal numbers of rows, rounded up, until there are no more."""
    rows, row = shape[0], math.prod(shape[1:])
    each = -(-rows // ranks)
    return tuple(min(rank * each, rows) * row for rank in range(ranks + 1))


def recut(parts: Sequence[Tensor], before: Cuts, after: Cuts, rank: int, group: dist.ProcessGroup) -> list[Tensor]:
    """This rank's parts of some flat tensors that are cut alike, cut anew; one all-to-all.

    Args:
        parts: elements ``before[rank]`` up to ``before[rank + 1]`` of each, contiguous.
        before: how they are cut.
        after: how they are to be cut.
        rank: this rank's number in ``group``.
        group: the ranks.

    Returns:
        New tensors: elements ``after[rank]`` up to ``after[rank + 1]`` of each.
    """
    ranks = range(len(before) - 1)

    def common(sender: int, receiver: int) -> tuple[int, int]:
        """The elements that pass from one to the other, counted in the sender's part."""
        begin, end = max(before[sender], after[receiver]), min(before[sender + 1], after[receiver + 1])
        return begin - before[sender], max(end, begin) - before[sender]

    pieces = [[part[slice(*common(rank, to))].view(torch.uint8) for part in parts] for to in ranks]
    counts = [(end - begin) for begin, end in (common(sender, rank) for sender in ranks)]
    sizes = [[count * part.element_size() for part in parts] for count in counts]
    sent = torch.cat([piece for those in pieces for piece in those])
    received = sent.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(
        received, sent, list(map(sum, sizes)), [sum(map(len, those)) for those in pieces], group=group
    )
    found = torch.split(received, [size for those in sizes for size in those])
    return [torch.cat(found[i :: len(parts)]).view(part.dtype) for i, part in enumerate(parts)]
