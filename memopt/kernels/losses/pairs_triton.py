# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The two kernels on similarities in Triton; the statistics of rows are those of ``logits_triton``.

Letters: R rows (queries) and C columns (keys) of a chunk; x similarities, z = scale * x. A program owns BC columns and
walks the rows for the columns' statistics, or owns a row's BC columns for the gradient; ROWS rows per program, more
than one only so that the interpreter, whose programs are expensive, stays usable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.backend import interpreting
from memopt.kernels.losses.triton_math import round_to

COLUMN_TILE = {"BR": 16, "BC": 64, "num_warps": 4}
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 8


@triton.jit
def column_kernel(
    x_ptr, x_stride, scale_ptr, highest_ptr, total_ptr, R, C,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = columns < C
    highest = tl.load(highest_ptr + columns, mask=inside, other=0.0)
    total = tl.load(total_ptr + columns, mask=inside, other=0.0)
    for first in range(0, R, BR):
        rows = first + tl.arange(0, BR)
        there = (rows < R)[:, None] & inside[None, :]
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_stride + columns[None, :], mask=there, other=0.0)
        z = tl.where(there, x.to(tl.float32) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(z, 0))
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - reference) + tl.sum(tl.exp(z - reference[None, :]), 0)
        highest = higher
    tl.store(highest_ptr + columns, highest, mask=inside)
    tl.store(total_ptr + columns, total, mask=inside)


@triton.jit
def gradient_kernel(
    x_ptr, x_stride, row_ptr, column_ptr, target_ptr, coefficient_ptr, scale_ptr, scale_gradient_ptr, R, C,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    scale, coefficient = tl.load(scale_ptr), tl.load(coefficient_ptr)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    column_highest = tl.load(column_ptr + columns, mask=inside, other=0.0)
    column_weight = tl.load(column_ptr + C + columns, mask=inside, other=0.0)
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        if row < R:
            place = x_ptr + row.to(tl.int64) * x_stride + columns
            raw = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            z = raw * scale
            d = tl.load(row_ptr + R + row) * tl.exp(z - tl.load(row_ptr + row))
            d += column_weight * tl.exp(z - column_highest)
            d -= tl.where(columns == tl.load(target_ptr + row), 2.0 * coefficient, 0.0)
            part = tl.sum(tl.where(inside, d * raw, 0.0), 0)
            tl.store(scale_gradient_ptr + row * blocks + block, part)
            tl.store(place, round_to(d * scale, x_ptr.dtype.element_ty, INTERPRET), mask=inside)


def column_statistics_(highest: Tensor, total: Tensor, similarities: Tensor, scale: Tensor) -> None:
    """See ``pairs_torch.column_statistics_``."""
    R, C = similarities.shape
    if R and C:
        column_kernel[(triton.cdiv(C, COLUMN_TILE["BC"]),)](
            similarities, similarities.stride(0), scale, highest, total, R, C, **COLUMN_TILE
        )


def pair_gradient_(
    similarities: Tensor, rows: Tensor, columns: Tensor, target: Tensor, coefficient: Tensor, scale: Tensor
) -> Tensor:
    """See ``pairs_torch.pair_gradient_``."""
    R, C = similarities.shape
    blocks, many = triton.cdiv(C, GRADIENT_BLOCK), max(1, R) if interpreting() else 1
    by_block = torch.zeros(R, max(1, blocks), dtype=torch.float32, device=similarities.device)
    if R and C:
        gradient_kernel[(triton.cdiv(R, many), blocks)](
            similarities, similarities.stride(0), rows.contiguous(), columns.contiguous(), target.contiguous(),
            coefficient, scale, by_block, R, C,
            BLOCK=GRADIENT_BLOCK, ROWS=many, INTERPRET=interpreting(), num_warps=GRADIENT_WARPS,
        )  # fmt: skip
    return by_block.sum(1)
