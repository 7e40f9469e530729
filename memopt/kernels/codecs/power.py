"""Power maps: the value of code k is (k / N)**p of the block's scale. Arithmetic alone, no table.

====== ======== ================================ ============================
name   bits     codes                            value / scale
====== ======== ================================ ============================
sq127  8        k + 127, k = -127 .. 127         sign(k) (k / 127)**2
sq15   4        k + 7, k = -7 .. 7               sign(k) (k / 7)**2
root4  8        k - 1, k = 1 .. 256              (k / 256)**4
sqrt   4        k - 1, k = 1 .. 16               (k / 16)**2
====== ======== ================================ ============================

In the domain ``a = |x| N**p / scale`` the values are whole powers k**p, so neighbours and midpoints are (nearly)
exact. The unsigned maps have no zero: a second moment in a block that is not all zero never decodes to 0, which would
make Adam's update explode. Below the first code the value rounds up to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memopt.kernels import math as km
from memopt.kernels.codecs.base import BIAS, NOISE, Codec, register_codec


@dataclass(frozen=True)
class SignedSquare(Codec):
    """sign(k) (k / last)**2 for k = -last .. last."""

    rounding: str = "stochastic"
    name: str = "sq127"
    bits: int = 8
    last: int = 127

    @property
    def unit(self) -> float:  # type: ignore[override]
        return float(self.last**2)

    def encode(self, x: Any, inverse: Any, noise: Any | None) -> Any:
        k = _nearest_root(km.abs(x) * inverse, self.last) if noise is None else _random_root(km.abs(x), inverse, noise)
        return km.copysign(k, x) + (BIAS + self.last)

    def decode(self, code: Any, scale: Any) -> Any:
        y = (code - float(self.last)) * (km.sqrt(scale) * (1.0 / self.last))
        return y * km.abs(y)


@dataclass(frozen=True)
class UnsignedSquare(Codec):
    """(k / last)**2 for k = 1 .. last."""

    rounding: str = "stochastic"
    name: str = "sqrt"
    bits: int = 4
    last: int = 16
    signed: bool = False

    @property
    def unit(self) -> float:  # type: ignore[override]
        return float(self.last**2)

    def encode(self, x: Any, inverse: Any, noise: Any | None) -> Any:
        k = _nearest_root(x * inverse, self.last) if noise is None else _random_root(x, inverse, noise)
        return km.maximum(k + (BIAS - 1.0), BIAS)

    def decode(self, code: Any, scale: Any) -> Any:
        cell = km.sqrt(scale) * (1.0 / self.last)
        y = km.fma(code, cell, cell)
        return y * y


@dataclass(frozen=True)
class FourthRoot(Codec):
    """(k / last)**4 for k = 1 .. last."""

    rounding: str = "stochastic"
    name: str = "root4"
    bits: int = 8
    last: int = 256
    signed: bool = False

    @property
    def unit(self) -> float:  # type: ignore[override]
        return float(self.last**4)

    def encode(self, x: Any, inverse: Any, noise: Any | None) -> Any:
        a = km.maximum(x * inverse, 1.0 + 2.0**-20)  # above every turn below 1
        if noise is None:
            a = km.minimum(a, self.unit)
        # 2**23 plus t - 1/2 rounds to 2**23 + floor(t) or, by an error of the root, to a neighbour of it: then a is
        # next to that power, and the comparison below still ends on the right side.
        k = km.root4(a) + (_UNIT_SPACING - 0.5)
        # With h = k + 1/2: (k**4 + (k+1)**4) / 2 = h**4 + 3/2 h**2 + 1/16 and (k+1)**4 - k**4 = h (4 h**2 + 1).
        h = k - (_UNIT_SPACING - 0.5)
        square = h * h
        turn = km.fma(square, square + 1.5, 0.0625)
        if noise is not None:
            turn = km.fma(noise * h, km.fma(square, 4.0 * NOISE, NOISE), turn)
        return km.where(a > turn, k, k - 1.0)

    def decode(self, code: Any, scale: Any) -> Any:
        cell = km.sqrt(km.sqrt(scale)) * (1.0 / self.last)
        y = km.fma(code, cell, cell)
        square = y * y
        return square * square


_UNIT_SPACING = 2.0**23  # float32 numbers from here on are whole; their low bits count from 0 here too


def _nearest_root(a: Any, last: int) -> Any:
    """The k in 0 .. last whose square is nearest to ``a``."""
    k = km.floor(km.sqrt(a))
    return km.minimum(km.where(a > km.fma(k, k, k + 0.5), k + 1.0, k), last)


def _random_root(x: Any, inverse: Any, noise: Any) -> Any:
    """A number whose magnitude rounds to the k chosen at random, for ``x * inverse`` = a between k**2 and (k+1)**2.

    Up with probability (a - k**2) / (2k + 1), that is, if a > k**2 + u (2k + 1) = (k + u)**2 + u (1 - u) with a uniform
    u; so k or k + 1 is the floor of sqrt(a - u (1 - u)) + 1 - u, and with v = 1/2 - u, u (1 - u) = 1/4 - v**2.
    """
    v = noise * NOISE
    return km.sqrt(km.maximum(km.fma(x, inverse, km.fma(v, v, -0.25)), 0.0)) + v


register_codec(SignedSquare())
register_codec(SignedSquare(name="sq15", bits=4, last=7, block=128))
register_codec(FourthRoot())
register_codec(UnsignedSquare(block=128))
