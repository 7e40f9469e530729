"""Power maps: the value of code k is (k / N)**p of the block's scale. Arithmetic alone, no table.

====== ======== ================================ ============================
name   bits     codes                            value / scale
====== ======== ================================ ============================
sq127  8        k + 127, k = -127 .. 127         sign(k) (k / 127)**2
sq15   4        k + 7, k = -7 .. 7               sign(k) (k / 7)**2
root4  8        k - 1, k = 1 .. 256              (k / 256)**4
sqrt   4        k - 1, k = 1 .. 16               (k / 16)**2
====== ======== ================================ ============================

In the domain ``|x| N**p / scale``, or a power of two times that, the values are whole powers k**p, so neighbours and
midpoints are (nearly) exact. An estimate of the root gives the cell between two values; the end of it to take is
decided by comparing with a turn between the two. The cell is that of the turn next to the number: where the estimate
leads to another one, the number lies between its turn and the right one, which both give the same code, so errors of
the estimate hardly matter. The unsigned maps have
no zero: a second moment in a block that is not all zero never decodes to 0, which would make Adam's update explode.
Below the first code the value rounds up to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memopt.kernels import math as km
from memopt.kernels.codecs.base import BIAS, Codec, register_codec


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
        return self.last**2 / 4

    def encode(self, x: Any, inverse: Any, noise: Any | None) -> Any:
        a = _within(x, inverse, -0.0625, 0.25, None if noise is not None else self.unit)
        # Halves, rounded to multiples of a half: k is a half of the cell's number, h a half of its middle, H / 4 with H
        # odd. Four times the turn in x is H**2 + 1 + 4 noise H; what is compared are quarters of that, less 1 / 16.
        root = km.rough_sqrt(a)
        k = (root if noise is None else km.fma(noise, -0.5, root)) + (_HALVES - 0.25)
        h = k - (_HALVES - 0.25)
        return km.step_down(k, km.fma(-h, h if noise is None else h + noise, a))

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
        return self.last**4 / 256

    def encode(self, x: Any, inverse: Any, noise: Any | None) -> Any:
        a = _within(x, inverse, 2.0**-10, 2.0**-8, None if noise is not None else self.unit)
        # As above with quarters: h = H / 8. Sixteen times the turn, plus 4, is (H**2 + 1) (H**2 + 5 + 8 noise H), as
        # (k**4 + (k+1)**4) / 2 = (H**4 + 6 H**2 + 1) / 16 and (k+1)**4 - k**4 = H (H**2 + 1) / 2.
        root = km.root4(a)
        k = (root if noise is None else km.fma(noise, -0.25, root)) + (_QUARTERS - 0.125)
        h = k - (_QUARTERS - 0.125)
        r = km.fma(h, h, 2.0**-6)
        other = r + 0.0625
        return km.step_down(k, km.fma(-r, other if noise is None else km.fma(noise, h, other), a))

    def decode(self, code: Any, scale: Any) -> Any:
        cell = km.sqrt(km.sqrt(scale)) * (1.0 / self.last)
        y = km.fma(code, cell, cell)
        square = y * y
        return square * square


# float32 numbers from here on are multiples of a half and of a quarter, and their low bits count them
_HALVES, _QUARTERS = 2.0**22, 2.0**21


def _within(x: Any, inverse: Any, shift: float, first: float, last: float | None) -> Any:
    """``x * inverse`` above every turn below the first value and not above the last, all of it shifted."""
    a = km.maximum(km.fma(x, inverse, shift), first * (1.0 + 2.0**-20) + shift)
    return a if last is None else km.minimum(a, last + shift)


def _nearest_root(a: Any, last: int) -> Any:
    """The k in 0 .. last whose square is nearest to ``a``."""
    k = km.floor(km.sqrt(a))
    return km.minimum(km.where(a > km.fma(k, k, k + 0.5), k + 1.0, k), last)


def _random_root(x: Any, inverse: Any, noise: Any) -> Any:
    """A number whose magnitude rounds to the k chosen at random, for ``x * inverse`` = a between k**2 and (k+1)**2.

    Up with probability (a - k**2) / (2k + 1), that is, if a > k**2 + u (2k + 1) = (k + u)**2 + u (1 - u) with a uniform
    u; so k or k + 1 is the floor of sqrt(a - u (1 - u)) + 1 - u; with the noise v = 1/2 - u, u (1 - u) = 1/4 - v**2.
    """
    return km.sqrt(km.maximum(km.fma(x, inverse, km.fma(noise, noise, -0.25)), 0.0)) + noise


register_codec(SignedSquare())
register_codec(SignedSquare(name="sq15", bits=4, last=7, block=128))
register_codec(FourthRoot())
register_codec(UnsignedSquare(block=128))
