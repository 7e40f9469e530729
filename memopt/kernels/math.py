"""The functions an update rule or a codec may use, over Python floats, torch tensors and symbolic operands alike.

A rule written with these and with ``+ - * /`` and comparisons is the torch oracle when called on tensors, and the
source of the C++ and Triton kernels when called on :class:`memopt.kernels.expr.Expr`. Elements are float32. Scalars
are Python floats: an expression of scalars alone is computed once per call in double precision.
"""

from __future__ import annotations

import math as _math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from memopt.kernels.expr import Expr, make

__all__ = [
    "abs",
    "clamp",
    "copysign",
    "exp",
    "exponent",
    "floor",
    "fma",
    "log",
    "maximum",
    "minimum",
    "power_of_two",
    "root4",
    "rough_sqrt",
    "rsqrt",
    "sign",
    "sqrt",
    "step_down",
    "take",
    "where",
]

Number = Any  # float | torch.Tensor | Expr: the three never mix except with floats

_abs, _min, _max = abs, min, max


def _unary(
    op: str, on_float: Callable[[float], float], on_tensor: Callable[[torch.Tensor], torch.Tensor], x: Number
) -> Number:
    if isinstance(x, Expr):
        return make(op, x)
    return on_tensor(x) if isinstance(x, torch.Tensor) else on_float(float(x))


def _pair(a: Number, b: Number) -> tuple[torch.Tensor, torch.Tensor]:
    like = a if isinstance(a, torch.Tensor) else b
    return torch.as_tensor(a, dtype=like.dtype, device=like.device), torch.as_tensor(
        b, dtype=like.dtype, device=like.device
    )


def sqrt(x: Number) -> Number:
    """Square root."""
    return _unary("sqrt", _math.sqrt, torch.sqrt, x)


def rsqrt(x: Number) -> Number:
    """1 / sqrt(x); the native kernel's error is below 2 ulp."""
    return _unary("rsqrt", lambda v: 1.0 / _math.sqrt(v), torch.rsqrt, x)


def rough_sqrt(x: Number) -> Number:
    """Square root of x > 0, which codecs use where an estimate to 2**-11 does."""
    return _unary("rough_sqrt", _math.sqrt, torch.sqrt, x)


def root4(x: Number) -> Number:
    """Fourth root; within codecs an estimate to 2**-10."""
    return _unary("root4", lambda v: _math.sqrt(_math.sqrt(v)), lambda t: t.sqrt().sqrt(), x)


def abs(x: Number) -> Number:
    """Magnitude."""
    return _unary("abs", _abs, torch.abs, x)


def sign(x: Number) -> Number:
    """-1, 0 or 1; NaN gives 0, as with ``torch.sign``."""
    return _unary("sign", lambda v: float((v > 0) - (v < 0)), lambda t: (t > 0).to(t.dtype) - (t < 0).to(t.dtype), x)


def copysign(x: Number, like: Number) -> Number:
    """The magnitude of x with the sign of ``like``."""
    if isinstance(x, Expr) or isinstance(like, Expr):
        return make("copysign", x, like)
    if isinstance(x, torch.Tensor) or isinstance(like, torch.Tensor):
        return torch.copysign(*_pair(x, like))
    return _math.copysign(x, like)


def floor(x: Number) -> Number:
    """Largest whole number not above x."""
    return _unary("floor", _math.floor, torch.floor, x)


def exp(x: Number) -> Number:
    """e to the x."""
    return _unary("exp", _math.exp, torch.exp, x)


def log(x: Number) -> Number:
    """Natural logarithm."""
    return _unary("log", _math.log, torch.log, x)


def exponent(x: Number) -> Number:
    """floor(log2(x)) of a normal float32 x > 0; -127 for zero and subnormal numbers."""
    return _unary(
        "exponent", lambda v: _math.frexp(v)[1] - 1.0, lambda t: ((t.view(torch.int32) >> 23) - 127).float(), x
    )


def power_of_two(x: Number) -> Number:
    """2**x for a whole x from -126 to 127."""
    return _unary("power_of_two", lambda v: 2.0**v, lambda t: ((t.int() + 127) << 23).view(torch.float32), x)


def minimum(a: Number, b: Number) -> Number:
    """The smaller; with a NaN on either side the result is not specified."""
    if isinstance(a, Expr) or isinstance(b, Expr):
        return make("minimum", a, b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.minimum(*_pair(a, b))
    return _min(a, b)


def maximum(a: Number, b: Number) -> Number:
    """The larger; with a NaN on either side the result is not specified."""
    if isinstance(a, Expr) or isinstance(b, Expr):
        return make("maximum", a, b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.maximum(*_pair(a, b))
    return _max(a, b)


def clamp(x: Number, low: Number, high: Number) -> Number:
    """x limited to [low, high]."""
    return minimum(maximum(x, low), high)


def where(condition: Number, a: Number, b: Number) -> Number:
    """a where the condition holds, else b."""
    if isinstance(condition, Expr):
        return make("where", condition, a, b)
    if isinstance(condition, torch.Tensor):
        if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
            return torch.where(
                condition,
                torch.tensor(float(a), device=condition.device),
                torch.tensor(float(b), device=condition.device),
            )
        return torch.where(condition, *_pair(a, b))
    return a if condition else b


def fma(a: Number, b: Number, c: Number) -> Number:
    """a * b + c with one rounding."""
    if isinstance(a, Expr) or isinstance(b, Expr) or isinstance(c, Expr):
        return make("fma", a, b, c)
    if any(isinstance(v, torch.Tensor) for v in (a, b, c)):
        # The product of two float32 numbers is exact in float64.
        wide: list[Any] = [v.double() if isinstance(v, torch.Tensor) else float(v) for v in (a, b, c)]
        return (wide[0] * wide[1] + wide[2]).float()
    return a * b + c


def step_down(x: Number, d: Number) -> Number:
    """The positive float32 x, one place of its last bit lower where d is negative."""
    if isinstance(x, Expr):
        return make("step_down", x, d)
    if isinstance(x, torch.Tensor):
        return (x.contiguous().view(torch.int32) + (d.contiguous().view(torch.int32) >> 31)).view(torch.float32)
    return step_down(torch.tensor(float(x)), torch.tensor(float(d))).item()


def take(table: Sequence[float], index: Number) -> Number:
    """table[index] for a whole-valued float32 index within the table."""
    if isinstance(index, Expr):
        return make("take", index, name=",".join(repr(float(v)) for v in table))
    if isinstance(index, torch.Tensor):
        return torch.tensor(table, dtype=index.dtype, device=index.device)[index.long()]
    return table[int(index)]
