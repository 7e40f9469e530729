# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The two kernels on logits in Triton: a program walks rows of a chunk in blocks of the vocabulary.

Letters: R rows, V entries; x raw logits, z final logits. BLOCK entries at a time; ROWS rows per program, more than one
only so that the interpreter, whose programs are expensive, stays usable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.backend import interpreting
from memopt.kernels.losses.logits import Logits
from memopt.kernels.losses.triton_math import final_logits, round_to

BLOCK = 2048
WARPS = 8


@triton.jit
def statistics_kernel(
    x_ptr, x_stride, target_ptr, bias_ptr, weight_ptr, soft_ptr, soft_stride, scale_ptr, softcap, out_ptr, argmax_ptr,
    R, V,
    HAS_TARGET: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFT: tl.constexpr,
    HAS_CAP: tl.constexpr, WANT_WEIGHTED: tl.constexpr, WANT_EXPECTED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        if row < R:
            highest = tl.full((), float("-inf"), tl.float32)
            total = tl.zeros((), tl.float32)
            expected = tl.zeros((), tl.float32)
            weighted = tl.zeros((), tl.float32)
            best = tl.zeros((), tl.int32)
            row_ptr = x_ptr + row.to(tl.int64) * x_stride
            for first in range(0, V, BLOCK):
                entries = first + tl.arange(0, BLOCK)
                inside = entries < V
                raw = tl.load(row_ptr + entries, mask=inside, other=0.0).to(tl.float32)
                if HAS_BIAS:
                    raw += tl.load(bias_ptr + entries, mask=inside, other=0.0)
                z = final_logits(raw, scale, softcap, HAS_CAP)
                bounded = tl.where(inside, z, float("-inf"))
                top = tl.max(bounded, 0)
                if top > highest:
                    best = tl.min(tl.where(bounded == top, entries, V), 0)
                higher = tl.maximum(highest, top)
                reference = tl.where(higher == float("-inf"), 0.0, higher)
                shrink = tl.exp(highest - reference)
                if WANT_EXPECTED:
                    moved = tl.where(shrink > 0, expected + total * tl.maximum(highest - reference, -1e4), 0.0)
                    below = bounded - reference
                    e = tl.exp(below)
                    expected = moved * shrink + tl.sum(tl.where(e > 0, e * tl.maximum(below, -1e4), 0.0), 0)
                    total = total * shrink + tl.sum(e, 0)
                else:
                    total = total * shrink + tl.sum(tl.exp(bounded - reference), 0)
                highest = higher
                if WANT_WEIGHTED:
                    share = tl.where(inside, z, 0.0)
                    if HAS_WEIGHT:
                        share *= tl.load(weight_ptr + entries, mask=inside, other=0.0)
                    if HAS_SOFT:
                        q_ptr = soft_ptr + row.to(tl.int64) * soft_stride
                        share *= tl.load(q_ptr + entries, mask=inside, other=0.0)
                    weighted += tl.sum(share, 0)
            tl.store(out_ptr + row, highest)
            tl.store(out_ptr + R + row, total)
            tl.store(out_ptr + 2 * R + row, expected)
            tl.store(out_ptr + 4 * R + row, weighted)
            tl.store(argmax_ptr + row, best.to(tl.int64))
            found = tl.zeros((), tl.float32)
            if HAS_TARGET:
                target = tl.load(target_ptr + row)
                held = (target >= 0) & (target < V)
                raw = tl.load(row_ptr + target, mask=held, other=0.0).to(tl.float32)
                if HAS_BIAS:
                    raw += tl.load(bias_ptr + target, mask=held, other=0.0)
                found = tl.where(held, final_logits(raw, scale, softcap, HAS_CAP), 0.0)
            tl.store(out_ptr + 3 * R + row, found)


@triton.jit
def gradient_kernel(
    x_ptr, x_stride, coefficient_ptr, target_ptr, bias_ptr, weight_ptr, soft_ptr, soft_stride, scale_ptr, softcap,
    scale_gradient_ptr, R, V,
    HAS_TARGET: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFT: tl.constexpr,
    HAS_CAP: tl.constexpr, WANT_SCALE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    entries = block * BLOCK + tl.arange(0, BLOCK)
    inside = entries < V
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        if row < R:
            row_ptr = x_ptr + row.to(tl.int64) * x_stride
            raw = tl.load(row_ptr + entries, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                raw += tl.load(bias_ptr + entries, mask=inside, other=0.0)
            z = final_logits(raw, scale, softcap, HAS_CAP)
            lse = tl.load(coefficient_ptr + row)
            of_softmax = tl.load(coefficient_ptr + R + row)
            of_target = tl.load(coefficient_ptr + 2 * R + row)
            of_uniform = tl.load(coefficient_ptr + 3 * R + row)
            d = of_softmax * tl.exp(z - lse)
            weights = tl.full((BLOCK,), 1.0, tl.float32)
            if HAS_WEIGHT:
                weights = tl.load(weight_ptr + entries, mask=inside, other=0.0)
            d -= of_uniform * weights
            if HAS_SOFT:
                q_ptr = soft_ptr + row.to(tl.int64) * soft_stride
                d -= of_target * weights * tl.load(q_ptr + entries, mask=inside, other=0.0)
            if HAS_TARGET:
                d -= tl.where(entries == tl.load(target_ptr + row), of_target, 0.0)
            if HAS_CAP:
                ratio = z / softcap
                d *= 1.0 - ratio * ratio
            if WANT_SCALE:
                part = tl.sum(tl.where(inside, d * raw, 0.0), 0)
                tl.store(scale_gradient_ptr + row * blocks + block, part)
            tl.store(row_ptr + entries, round_to(d * scale, x_ptr.dtype.element_ty, INTERPRET), mask=inside)


def logit_statistics(x: Logits, want_weighted: bool, want_expected: bool) -> tuple[Tensor, Tensor]:
    """See ``logits_torch.logit_statistics``."""
    R, V = x.raw.shape
    out = torch.empty(5, R, dtype=torch.float32, device=x.raw.device)
    argmax = torch.empty(R, dtype=torch.int64, device=x.raw.device)
    rows = _rows_per_program(R)
    if R:
        statistics_kernel[(triton.cdiv(R, rows),)](
            x.raw, x.raw.stride(0), x.target, x.bias, x.class_weight, x.soft, V, x.scale, x.softcap, out, argmax, R, V,
            HAS_TARGET=x.target is not None, HAS_BIAS=x.bias is not None, HAS_WEIGHT=x.class_weight is not None,
            HAS_SOFT=x.soft is not None, HAS_CAP=x.softcap > 0, WANT_WEIGHTED=want_weighted,
            WANT_EXPECTED=want_expected, BLOCK=BLOCK, ROWS=rows, num_warps=WARPS,
        )  # fmt: skip
    return out, argmax


def softmax_gradient_(x: Logits, coefficients: Tensor, want_scale: bool) -> Tensor:
    """See ``logits_torch.softmax_gradient_``."""
    R, V = x.raw.shape
    rows, blocks = _rows_per_program(R), triton.cdiv(V, BLOCK)
    by_scale = torch.zeros(R, blocks if want_scale else 1, dtype=torch.float32, device=x.raw.device)
    if R:
        gradient_kernel[(triton.cdiv(R, rows), blocks)](
            x.raw, x.raw.stride(0), coefficients.contiguous(), x.target, x.bias, x.class_weight, x.soft, V, x.scale,
            x.softcap, by_scale, R, V,
            HAS_TARGET=x.target is not None, HAS_BIAS=x.bias is not None, HAS_WEIGHT=x.class_weight is not None,
            HAS_SOFT=x.soft is not None, HAS_CAP=x.softcap > 0, WANT_SCALE=want_scale, BLOCK=BLOCK, ROWS=rows,
            INTERPRET=interpreting(), num_warps=WARPS,
        )  # fmt: skip
    return by_scale.sum(1)


def _rows_per_program(R: int) -> int:
    return max(1, R) if interpreting() else 1
