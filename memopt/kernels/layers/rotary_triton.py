# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The rotary embedding in Triton, for tensors of up to four dimensions with any strides.

Letters: A x B x C rows of D pairs; BLOCK the power of two from D on; ROWS rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.backend import interpreting
from memopt.kernels.layers import rotary_torch
from memopt.kernels.losses.triton_math import round_to

WARPS = 4


@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, x_a, x_b, x_c, x_d, cos_a, cos_b, cos_c, cos_d, sin_a, sin_b, sin_c, sin_d,
    second, sign, COUNT, B, C, D, BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (row < COUNT) & (d < D)
    a, b, c = row // (B * C), row // C % B, row % C
    place = x_ptr + a * x_a + b * x_b + c * x_c + d * x_d
    u = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(place + second, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + a * cos_a + b * cos_b + c * cos_c + d * cos_d, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + a * sin_a + b * sin_b + c * sin_c + d * sin_d, mask=inside, other=0.0).to(tl.float32) * sign
    element: tl.constexpr = x_ptr.dtype.element_ty
    tl.store(place, round_to(u * cos - v * sin, element, INTERPRET), mask=inside)
    tl.store(place + second, round_to(v * cos + u * sin, element, INTERPRET), mask=inside)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> None:
    """See ``rotary_torch``."""
    if x.dim() > 4 or torch.float64 in (cos.dtype, sin.dtype):
        rotary_torch.rotate_(x, cos, sin, interleaved, back)
        return
    pairs = x.shape[-1] // 2
    wide = x[(None,) * (4 - x.dim())]
    half = (*wide.shape[:-1], pairs)
    step = 2 if interleaved else 1
    strides = [*wide.stride()[:3], step * wide.stride(3), *cos.expand(half).stride(), *sin.expand(half).stride()]
    second = wide.stride(3) if interleaved else pairs * wide.stride(3)
    rows = wide.shape[0] * wide.shape[1] * wide.shape[2]
    block = max(16, triton.next_power_of_2(pairs))
    together = max(1, (64 if interpreting() else 1) * 1024 // block)
    if x.numel():
        rotate_kernel[(triton.cdiv(rows, together),)](
            wide, cos, sin, *strides, second, -1.0 if back else 1.0, rows, wide.shape[1], wide.shape[2], pairs,
            BLOCK=block, ROWS=together, INTERPRET=interpreting(), num_warps=WARPS,
        )  # fmt: skip
