# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The norms in Triton: a program holds a row in registers; longer rows go to the torch implementation.

Letters: R rows, D elements each; BLOCK the power of two from D on; ROWS rows of a program, one after another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.backend import interpreting
from memopt.kernels.layers import norms_torch
from memopt.kernels.layers.norms_torch import Kept
from memopt.kernels.losses.triton_math import round_to

LONGEST, LONGEST_ODD = 8192, 4096  # what registers hold; unless D is a multiple of 16, addresses take many
PROGRAMS = 512  # of the backward kernel, each of which sums the weight's gradient over its rows


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, inverse_ptr, eps, R, D,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    inside = lane < D
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        if row < R:
            place = row.to(tl.int64) * D + lane
            x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if CENTRED:
                mean = tl.sum(x, 0) / D
                tl.store(mean_ptr + row, mean)
                x = tl.where(inside, x - mean, 0.0)
            inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
            tl.store(inverse_ptr + row, inverse)
            x *= inverse
            if HAS_WEIGHT:
                x *= tl.load(weight_ptr + lane, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias_ptr + lane, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr + place, round_to(x, y_ptr.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def backward_kernel(
    of_y_ptr, kept_ptr, weight_ptr, bias_ptr, mean_ptr, inverse_ptr, of_x_ptr, sums_ptr, R, D, ROWS,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr, KEEP_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    inside = lane < D
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    program = tl.program_id(0)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, R)):
        place = tl.cast(row, tl.int64) * D + lane
        unit = tl.load(kept_ptr + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(of_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row)
        if KEEP_OUTPUT:
            if HAS_BIAS:
                unit -= tl.load(bias_ptr + lane, mask=inside, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                unit /= tl.load(weight_ptr + lane, mask=inside, other=1.0).to(tl.float32)
        else:
            if CENTRED:
                unit = tl.where(inside, unit - tl.load(mean_ptr + row), 0.0)
            unit *= inverse
        if HAS_WEIGHT:
            of_weight += g * unit
        if HAS_BIAS:
            of_bias += g
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + lane, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(g * unit, 0) / D
        if CENTRED:
            g -= tl.sum(g, 0) / D
        of_x = (g - unit * along) * inverse
        tl.store(of_x_ptr + place, round_to(of_x, of_x_ptr.dtype.element_ty, INTERPRET), mask=inside)
    sums = sums_ptr + program.to(tl.int64) * 2 * D + lane
    tl.store(sums, of_weight, mask=inside)
    tl.store(sums + D, of_bias, mask=inside)


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``norms_torch``."""
    R, D = x.numel() // x.shape[-1], x.shape[-1]
    if not _fits(D):
        return norms_torch.norm(x, weight, bias, eps, centred)
    y = torch.empty_like(x)
    mean = torch.empty(R if centred else 0, device=x.device)
    inverse = torch.empty(R, device=x.device)
    rows = max(1, R) if interpreting() else 1
    if R:
        forward_kernel[(triton.cdiv(R, rows),)](
            x, weight, bias, y, mean, inverse, eps, R, D,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, CENTRED=centred, ROWS=rows,
            INTERPRET=interpreting(), **shape_of(D),
        )  # fmt: skip
    return y, mean, inverse


def norm_backward(of_y: Tensor, k: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """See ``norms_torch``."""
    R, D = k.rows.numel() // k.rows.shape[-1], k.rows.shape[-1]
    if not _fits(D):
        return norms_torch.norm_backward(of_y, k)
    of_x = torch.empty_like(k.rows)
    rows = triton.cdiv(R, 2 if interpreting() else PROGRAMS)
    programs = triton.cdiv(R, rows) if R else 0
    sums = torch.empty(programs, 2, D, device=of_y.device)
    if R:
        backward_kernel[(programs,)](
            of_y, k.rows, k.weight, k.bias, k.mean, k.inverse, of_x, sums, R, D, rows,
            HAS_WEIGHT=k.weight is not None, HAS_BIAS=k.bias is not None, CENTRED=k.centred, KEEP_OUTPUT=k.is_output,
            INTERPRET=interpreting(), **shape_of(D),
        )  # fmt: skip
    return of_x, sums[:, 0].sum(0), sums[:, 1].sum(0)


def _fits(D: int) -> bool:
    return (LONGEST_ODD if D % 16 else LONGEST) >= D


def shape_of(D: int) -> dict[str, int]:
    """Block and warps for rows of D: at most 16 elements of a row for each thread."""
    block = max(128, triton.next_power_of_2(D))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
