"""The InfoNCE loss of pairs in both directions, without their similarity matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.kernels.losses.checks import (
    autocast_dtype,
    autocast_off,
    check_dense,
    check_group,
    check_scale,
    refuse_second_derivatives,
)
from memopt.kernels.losses.contrastive_ring import Ring
from memopt.kernels.losses.logits_ops import logit_statistics
from memopt.kernels.losses.pairs_ops import column_statistics_, pair_gradient_
from memopt.kernels.losses.settings import Settings, even_chunks, rows_per_chunk

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CHUNK_BYTES = 32 * 2**20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    *,
    logit_scale: float | Tensor,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The mean of both directions of InfoNCE, similarities made a chunk of rows at a time, forward and backward.

    With z = logit_scale * queries @ keys.T of N pairs:

        loss = 1 / (2 N) * sum_i (lse(z[i, :]) - z[i, i] + lse(z[:, i]) - z[i, i])

    Args:
        queries: (N, D); usually normalised.
        keys: (N, D) of the same dtype, row i belonging to row i of the queries.
        logit_scale: a number or a scalar tensor, which gets a gradient.
        chunk_bytes: scratch for similarities; 32 MiB unless given.
        process_group: ranks with pairs of their own, not necessarily equally many; every query meets the keys of all
            ranks, which travel round a ring. Each rank returns the mean over all pairs, and the gradient of it with
            respect to its own tensors; for ``logit_scale`` that is the part of its own queries, so that a sum over
            ranks is the whole.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    torch.compile leaves the call to eager mode.

    Cost: memory of ``chunk_bytes`` and 4 * D + 16 bytes per pair (twice that in 16 bits), where the plain loss keeps
    several N x N matrices; time of four products over (N, N, D) where the plain one has three.

    Source: tiles, ring and recomputing backward as in "Breaking the Memory Barrier: Near Infinite Batch Size Scaling
    for Contrastive Loss" section 3. We differ: both directions from one pass over the similarities.
    """
    for name, tensor in (("queries", queries), ("keys", keys)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape (pairs, width), got {tuple(tensor.shape)}")
        check_dense(name, tensor)
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(map(str, _DTYPES))}, got {tensor.dtype}")
    if queries.shape != keys.shape:
        raise ValueError(f"queries and keys must have one shape, got {tuple(queries.shape)} and {tuple(keys.shape)}")
    if queries.device != keys.device:
        raise ValueError(f"queries are on {queries.device} but keys on {keys.device}; move one of them")
    if (cast := autocast_dtype(queries.device)) is not None:
        queries, keys = queries.to(cast), keys.to(cast)
    if queries.dtype != keys.dtype:
        raise ValueError(f"queries are {queries.dtype} but keys {keys.dtype}; cast one of them, or use autocast")
    budget = Settings(chunk_bytes=_CHUNK_BYTES if chunk_bytes is None else chunk_bytes).chunk_bytes
    check_group(process_group)
    scale = check_scale(logit_scale, queries)
    if scale is None:
        raise TypeError("logit_scale must be a number or a scalar tensor, got None")
    ring = Ring.of(process_group, keys)
    loss: Tensor = _Contrastive.apply(queries, keys, scale, budget, ring)[0]  # type: ignore[no-untyped-call]
    return loss


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(queries: Tensor, keys: Tensor, scale: Tensor, budget: int, ring: Ring) -> tuple[Tensor, Tensor, Tensor]:
        with autocast_off(queries.device):
            return _forward(queries, keys, _scalar(scale, queries), budget, ring)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        queries, keys, scale, ctx.budget, ctx.ring = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(queries, keys, scale, *output[1:])

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("contrastive_loss")
        queries, keys, scale, rows, columns = ctx.saved_tensors
        with torch.no_grad(), autocast_off(queries.device):
            of_queries, of_keys, of_scale = _backward(
                queries, keys, _scalar(scale, queries), rows, columns, of_loss, ctx.budget, ctx.ring
            )
        needed = ctx.needs_input_grad
        return (
            of_queries if needed[0] else None,
            of_keys if needed[1] else None,
            of_scale.to(scale.dtype).view(scale.shape) if needed[2] else None,
            None,
            None,
        )


def _scalar(scale: Tensor, like: Tensor) -> Tensor:
    return scale.to(torch.float64 if like.dtype == torch.float64 else torch.float32).reshape(())


def _forward(queries: Tensor, keys: Tensor, scale: Tensor, budget: int, ring: Ring) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; (2, N) maxima and sums of exponentials, by row and by column.

    Column statistics travel with their keys and are whole when they are home.
    """
    N = queries.shape[0]
    row_highest = scale.new_full((N,), -float("inf"))
    row_total, pair = scale.new_zeros(N), scale.new_zeros(N)
    scratch = _scratch(queries, budget, ring)
    visitor = ring.visitor(keys, scale.new_full((N,), -float("inf")), scale.new_zeros(N))
    for step in range(ring.size):
        block, column_highest, column_total = visitor.tensors
        for rows, chunk in _similarities(queries, block, scratch):
            own = torch.arange(rows.start, rows.stop, device=queries.device) if step == 0 else None
            statistics, _ = logit_statistics(chunk, own, None, None, None, scale, 0.0, False, False)
            if step == 0:
                pair[rows] = statistics[3]
            top = torch.maximum(row_highest[rows], statistics[0])
            row_total[rows] *= (row_highest[rows] - top).exp()
            row_total[rows] += statistics[1] * (statistics[0] - top).exp()
            row_highest[rows] = top
            column_statistics_(column_highest, column_total, chunk, scale)
        visitor = ring.pass_on(visitor)
    _, column_highest, column_total = visitor.tensors
    total = ((row_highest - pair) + row_total.log() + (column_highest - pair) + column_total.log()).sum()
    by_row, by_column = torch.stack([row_highest, row_total]), torch.stack([column_highest, column_total])
    return ring.sum_(total) / (2 * ring.pairs), by_row, by_column


def _backward(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    row_statistics: Tensor,
    column_statistics: Tensor,
    of_loss: Tensor,
    budget: int,
    ring: Ring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from similarities made again; a block's gradient travels with its keys and is whole when it is home."""
    narrow = queries.dtype in (torch.bfloat16, torch.float16)
    sums = scale.dtype if narrow else queries.dtype
    coefficient = of_loss.to(scale.dtype) / (2 * max(ring.pairs, 1))
    by_row, by_column = (torch.stack([s[0], coefficient / s[1]]) for s in (row_statistics, column_statistics))
    of_queries = torch.zeros_like(queries, dtype=sums)
    of_scale = torch.zeros_like(scale)
    scratch = _scratch(queries, budget, ring)
    visitor = ring.visitor(keys, *by_column, torch.zeros_like(keys, dtype=sums))
    for step in range(ring.size):
        block, *statistics, of_block = visitor.tensors
        of_columns = torch.stack(statistics)
        for rows, chunk in _similarities(queries, block, scratch):
            own = torch.arange(rows.start, rows.stop, device=queries.device)
            own = own if step == 0 else torch.full_like(own, -1)
            of_scale += pair_gradient_(chunk, by_row[:, rows], of_columns, own, coefficient, scale).sum()
            if narrow:
                of_queries[rows] += chunk @ block
                of_block += chunk.t() @ queries[rows]
            else:
                of_queries[rows].addmm_(chunk, block)
                of_block.addmm_(chunk.t(), queries[rows])
        visitor = ring.pass_on(visitor)
    return of_queries.to(queries.dtype), visitor.tensors[-1].to(keys.dtype), of_scale


def _scratch(queries: Tensor, budget: int, ring: Ring) -> Tensor:
    """Room for a chunk of rows against the largest block of any rank; of one row at least."""
    N, C = queries.shape[0], max(ring.counts)
    rows = min(N, rows_per_chunk(N, C * queries.element_size(), budget))
    return torch.empty(rows * C, dtype=queries.dtype, device=queries.device)


def _similarities(queries: Tensor, block: Tensor, scratch: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows of ``queries @ block.T``, one after the other in the same scratch."""
    N, C = queries.shape[0], block.shape[0]
    if C == 0:
        return
    for rows in even_chunks(N, C, scratch.numel()):
        out = scratch[: (rows.stop - rows.start) * C].view(-1, C)
        yield rows, torch.mm(queries[rows], block.t(), out=out)
