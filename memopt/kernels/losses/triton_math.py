# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Small device functions of the loss kernels: no inline assembly and no vendor library, so that every target has them.

INTERPRET is true under TRITON_INTERPRET=1, whose casts to bfloat16 truncate and whose products of bfloat16 are wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(value, element: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 to ``element``, to nearest with ties to even."""
    if INTERPRET and element == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        nothing = tl.full(value.shape, 0x7FC0, tl.uint16)
        return tl.where(value != value, nothing, rounded).to(tl.bfloat16, bitcast=True)
    return value.to(element)


@triton.jit
def product(a, b, accumulator, INTERPRET: tl.constexpr):
    """accumulator + a @ b in float32; float32 operands are multiplied in full precision."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def hyperbolic_tangent(u):
    """From an exponential, and from its series near zero, where the quotient would cancel."""
    e = tl.exp(-2.0 * tl.abs(u))
    far = tl.where(u < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    square = u * u
    near = u * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))
    return tl.where(tl.abs(u) < 0.1, near, far)


@triton.jit
def final_logits(raw, scale, softcap, HAS_CAP: tl.constexpr):
    """z = softcap * tanh(scale * raw / softcap), or scale * raw."""
    z = raw * scale
    if HAS_CAP:
        z = softcap * hyperbolic_tangent(z / softcap)
    return z
