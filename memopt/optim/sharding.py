"""What the optimizers need to know of DTensor parameters: the part held here, where it lies, and who holds the rest.

FSDP2 gives every parameter as a DTensor sharded along its first dimension, in uneven parts where that does not divide.
Optimizers work on the local part; precision, rows and blocks follow the whole shape, and the stochastic rounding
follows the element's index in the whole parameter, so that a sharded run gives the values of an unsharded one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from memopt.optim.layout import Extent

Shape = tuple[int, ...]


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor (no import of torch.distributed.tensor where none is used)."""
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter  # the attributes it lacks are slow to look up
    return not plain and dist.is_available() and hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def local_of(tensor: Tensor) -> Tensor:
    """The part held by this rank, sharing memory and detached; an ordinary tensor is its own part.

    Raises:
        ValueError: a DTensor whose values still have to be summed over ranks.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    if any(placement.is_partial() for placement in cast(Any, tensor).placements):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} is a DTensor with partial sums ({cast(Any, tensor).placements}); "
            "redistribute it to a sharded or replicated one first"
        )
    return cast(Tensor, cast(Any, tensor)._local_tensor).detach()


@lru_cache(maxsize=65536)
def _place(shape: Shape, mesh: Any, placements: tuple[Any, ...]) -> tuple[Shape, Shape]:
    """Local shape and the offset of its first element in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    return tuple(local), tuple(offset)


def extent_of(param: Tensor) -> Extent:
    """The whole shape of a parameter and the shape of the part held here.

    Cut along another dimension than the first (tensor parallelism by columns), rows are shorter on every rank: the
    whole shape given is then that of the rows as they are cut, and blocks are those of the shorter rows.
    """
    if not is_sharded(param):
        shape = tuple(param.shape)
        return Extent(shape, shape)
    local = tuple(local_of(param).shape)
    return Extent((*param.shape[:1], *local[1:]), local)


def cut_by_rows(param: Tensor) -> tuple[dist.ProcessGroup, int] | None:
    """The ranks over which a sharded parameter is cut by its first dimension and no other, and this one's number.

    None where it is cut otherwise, or has so many elements that random numbers go by the row's start.
    """
    from torch.distributed.tensor import Shard

    one = cast(Any, param)
    cut = [dimension for dimension, placement in enumerate(one.placements) if not placement.is_replicate()]
    if len(cut) != 1 or one.placements[cut[0]] != Shard(0) or param.numel() > 2**32:
        return None
    return one.device_mesh.get_group(cut[0]), one.device_mesh.get_local_rank(cut[0])


def cuts_between(param: Tensor, block: int) -> bool:
    """Whether ranks hold equal parts of a parameter, all of them whole blocks of ``block`` elements: its states as one
    flat row can then be cut as it is. Decided by the whole shape and the mesh, alike on every rank.
    """
    cut = cut_by_rows(param)
    if cut is None:
        return False
    parts = cut[0].size()
    return param.shape[0] % parts == 0 and param.numel() // parts % block == 0


def offset_of(param: Tensor) -> int:
    """Index, in the flattened whole parameter, of the first element held here; 0 for an ordinary tensor."""
    if not is_sharded(param):
        return 0
    one = cast(Any, param)
    local, offset = _place(tuple(param.shape), one.device_mesh, tuple(one.placements))
    if math.prod(local) == 0:
        return 0
    index = 0
    for size, start in zip(param.shape, offset, strict=True):
        index = index * size + start
    return index


def like(param: Tensor, local: Tensor, shape: Shape, *, cut: bool | None = None) -> Tensor:
    """A state's local part as a tensor that checkpoints can reshard.

    Args:
        param: the parameter the state belongs to.
        local: the state's part on this rank. Its first dimension is cut as the parameter's, or the same on every rank
            that shares rows.
        shape: the whole state's shape.
        cut: whether it is cut; by default, whether its first size is the parameter's.

    Returns:
        A DTensor with the parameter's placements, sharing memory with ``local``; ``local`` itself for an ordinary one.
    """
    if not is_sharded(param):
        return local
    from torch.distributed.tensor import DTensor, Replicate

    one = cast(Any, param)
    placements = one.placements
    if not (shape[:1] == param.shape[:1] if cut is None else cut):
        placements = [Replicate() if placement.is_shard(0) else placement for placement in placements]
    stride = torch.empty(shape, device="meta").stride()
    return cast(
        Tensor,
        DTensor.from_local(local, one.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride),
    )


def stand_in(param: Tensor, shape: Shape) -> Tensor:
    """An ordinary tensor of a sharded one's type and device, of no memory, for what only these decide."""
    local = local_of(param)
    return torch.zeros((), dtype=local.dtype, device=local.device).expand(shape)


def gather(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor as a new ordinary one; one all-gather, in which all its ranks must take part."""
    return cast(Tensor, cast(Any, tensor).full_tensor()).detach().clone()


def kept_of(saved: Tensor, target: Tensor) -> Tensor:
    """Of a saved state what is kept here in ``target``: the part of a sharded one, the whole of an ordinary one."""
    if is_sharded(saved):
        return local_of(saved) if is_sharded(target) else gather(saved)
    return part_of(saved, target) if saved.shape == target.shape else saved.detach()


def gather_like(part: Tensor, param: Tensor) -> Tensor:
    """The whole of something that every rank has for its part of ``param``, in the same shape; one all-gather."""
    if not is_sharded(param):
        return part
    return cast(Tensor, cast(Any, like(param, part.contiguous(), tuple(param.shape))).full_tensor())


def part_of(whole: Tensor, param: Tensor) -> Tensor:
    """Of something in the shape of the whole of ``param``, what belongs to the part held here; a view."""
    if not is_sharded(param):
        return whole
    one = cast(Any, param)
    local, offset = _place(tuple(param.shape), one.device_mesh, tuple(one.placements))
    for dimension, (size, start) in enumerate(zip(local, offset, strict=True)):
        whole = whole.narrow(dimension, min(start, whole.shape[dimension] - size), size)
    return whole


def scatter(whole: Tensor, param: Tensor) -> None:
    """Copy from the whole of a parameter, known to every rank, the part held here; nothing is communicated."""
    local_of(param).copy_(part_of(whole, param))


def _reduce(value: Tensor, param: Tensor, operation: Any, *, rows_only: bool = False) -> Tensor:
    if is_sharded(param):
        one = cast(Any, param)
        for dimension, placement in enumerate(one.placements):
            if placement.is_shard(0) if rows_only else not placement.is_replicate():  # replicas hold the same values
                dist.all_reduce(value, op=operation, group=one.device_mesh.get_group(dimension))
    return value


def reduce_max(value: Tensor, param: Tensor) -> Tensor:
    """The elementwise largest over the ranks that hold parts of ``param``, in place; one all-reduce.

    Every one of these ranks must call it, those that hold no element too (with ``-inf`` or 0 where fitting); an
    ordinary parameter's value is returned as it is.
    """
    return _reduce(value, param, dist.ReduceOp.MAX)


def join_columns(params: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None]:
    """What raises the column maxima of these parameters, in place, to those of all rows; one all-reduce a mesh.

    It takes as many tensors for each parameter as for the others, in the order of ``params``, and all ranks must call
    it alike, those that hold no row too.
    """

    def join(maxima: Sequence[Tensor]) -> None:
        each = len(maxima) // len(params)
        for members in _by_mesh(params).values():
            mine = [maxima[each * i + k] for i in members for k in range(each)]
            flat = torch.cat([one.flatten() for one in mine])
            _reduce(flat, params[members[0]], dist.ReduceOp.MAX, rows_only=True)
            at = 0
            for one in mine:
                one.copy_(flat[at : at + one.numel()].view_as(one))
                at += one.numel()

    return join


def reduce_sum(value: Tensor, param: Tensor) -> Tensor:
    """The elementwise sum over the ranks that hold parts of ``param``, in place; see :func:`reduce_max`."""
    return _reduce(value, param, dist.ReduceOp.SUM)


def sum_each(values: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Numbers that belong to parameters, summed over the ranks that share each of them.

    Args:
        values: float [kinds, parameters], this rank's shares; changed.
        params: the parameters; ordinary ones keep their values.
    """
    for members in _by_mesh(params).values():
        values[:, members] = reduce_sum(values[:, members], params[members[0]])
    return values


def _by_mesh(params: Sequence[Tensor]) -> dict[Any, list[int]]:
    """The numbers of the sharded ones among the parameters, those together that share a mesh and its placements."""
    meshes: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        if is_sharded(param):
            one = cast(Any, param)
            meshes.setdefault((one.device_mesh, tuple(one.placements)), []).append(i)
    return meshes
