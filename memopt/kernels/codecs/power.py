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
from memopt.kernels.codecs.base import Codec, register_codec


@dataclass(frozen=True)
class SignedSquare(Codec):
    """sign(k) (k / top)**2 for k = -top .. top."""

    rounding: str = "stochastic"
    name: str = "sq127"
    bits: int = 8
    top: int = 127

    @property
    def unit(self) -> float:  # type: ignore[override]
        return float(self.top**2)

    def encode(self, a: Any, u: Any | None) -> Any:
        m = km.minimum(km.abs(a), self.unit)
        k = km.floor(km.sqrt(m))
        if u is None:
            up = m > k * k + (k + 0.5)
        else:
            up = m > km.fma(u, k + (k + 1.0), k * k)
        k = km.where(up, k + 1.0, k)
        return km.where(a < 0.0, self.top - k, self.top + k)

    def decode(self, code: Any) -> Any:
        y = (code - float(self.top)) * (1.0 / self.top)
        return y * km.abs(y)


@dataclass(frozen=True)
class UnsignedSquare(Codec):
    """(k / top)**2 for k = 1 .. top."""

    rounding: str = "stochastic"
    name: str = "sqrt"
    bits: int = 4
    top: int = 16
    signed: bool = False

    @property
    def unit(self) -> float:  # type: ignore[override]
        return float(self.top**2)

    def encode(self, a: Any, u: Any | None) -> Any:
        m = km.minimum(a, self.unit)
        k = km.floor(km.sqrt(m))
        if u is None:
            up = m > k * k + (k + 0.5)
        else:
            up = m > km.fma(u, k + (k + 1.0), k * k)
        return km.maximum(km.where(up, k, k - 1.0), 0.0)

    def decode(self, code: Any) -> Any:
        y = (code + 1.0) * (1.0 / self.top)
        return y * y


@dataclass(frozen=True)
class FourthRoot(Codec):
    """(k / top)**4 for k = 1 .. top."""

    rounding: str = "stochastic"
    name: str = "root4"
    bits: int = 8
    top: int = 256
    signed: bool = False

    @property
    def unit(self) -> float:  # type: ignore[override]
        return float(self.top**4)

    def encode(self, a: Any, u: Any | None) -> Any:
        m = km.minimum(a, self.unit)
        k = km.floor(km.sqrt(km.sqrt(m)))
        q = k * k + k
        if u is None:
            # (k**4 + (k+1)**4) / 2 = (q+1)**2 - 1/2 with q = k**2 + k: rounded once
            up = m > km.fma(q + 1.0, q + 1.0, -0.5)
        else:
            # (k+1)**4 - k**4 = (2k+1)(2q+1)
            square = k * k
            up = m > km.fma(u * (k + (k + 1.0)), q + (q + 1.0), square * square)
        return km.maximum(km.where(up, k, k - 1.0), 0.0)

    def decode(self, code: Any) -> Any:
        y = (code + 1.0) * (1.0 / self.top)
        square = y * y
        return square * square


register_codec(SignedSquare())
register_codec(SignedSquare(name="sq15", bits=4, top=7, block=128))
register_codec(FourthRoot())
register_codec(UnsignedSquare(block=128))
