# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The gated activations in Triton: one pass forward, one backward.

Letters: N elements, BLOCK of them per program; KIND 0 silu, 1 gelu, 2 gelu by tanh.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.backend import interpreting
from memopt.kernels.losses.triton_math import round_to

BLOCK, WARPS = 1024, 4
KINDS = {"silu": 0, "gelu_none": 1, "gelu_tanh": 2}


@triton.jit
def complementary_error(x):
    """erfc by the Chebyshev fit of Numerical Recipes, section 6.2: relative error below 1.2e-7."""
    z = tl.abs(x)
    t = 1.0 / (1.0 + 0.5 * z)
    q = -0.82215223 + t * 0.17087277
    q = 0.27886807 + t * (-1.13520398 + t * (1.48851587 + t * q))
    q = 0.37409196 + t * (0.09678418 + t * (-0.18628806 + t * q))
    q = -1.26551223 + t * (1.00002368 + t * q)
    tail = t * tl.exp(q - z * z)
    return tl.where(x >= 0.0, tail, 2.0 - tail)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """Value and slope; gelu by tanh is x * sigmoid(2 u)."""
    if KIND == 1:
        below = 0.5 * complementary_error(x * -0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * below, below + x * density
    twice_u = x
    inner = tl.full(x.shape, 1.0, tl.float32)
    if KIND == 2:
        square = x * x
        twice_u = x * (1.5957691216057308 + 0.07135481627159922 * square)
        inner = 1.5957691216057308 + 0.21406444881479766 * square
    s = 1.0 / (1.0 + tl.exp(tl.minimum(-twice_u, 88.0)))
    return x * s, s + x * inner * (s * (1.0 - s))


@triton.jit
def forward_kernel(
    gate_ptr, up_ptr, out_ptr, N, KIND: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = activate(gate, KIND)
    tl.store(out_ptr + at, round_to(value * up, out_ptr.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def backward_kernel(
    of_out_ptr, gate_ptr, up_ptr, of_gate_ptr, of_up_ptr, N,
    KIND: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    g = tl.load(of_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = activate(gate, KIND)
    element: tl.constexpr = of_up_ptr.dtype.element_ty
    tl.store(of_up_ptr + at, round_to(g * value, element, INTERPRET), mask=inside)
    tl.store(of_gate_ptr + at, round_to(g * up * slope, element, INTERPRET), mask=inside)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See ``gated_torch``."""
    out = torch.empty_like(gate)
    _launch(forward_kernel, out.numel(), activation, gate, up, out)
    return out


def gated_backward(of_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See ``gated_torch``."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(gate)
    _launch(backward_kernel, gate.numel(), activation, of_out, gate, up, of_gate, of_up)
    return of_gate, of_up


def _launch(kernel, count: int, activation: str, *tensors: Tensor) -> None:
    block = 64 * BLOCK if interpreting() else BLOCK
    if count:
        kernel[(triton.cdiv(count, block),)](
            *tensors, count, KIND=KINDS[activation], BLOCK=block, INTERPRET=interpreting(), num_warps=WARPS
        )
