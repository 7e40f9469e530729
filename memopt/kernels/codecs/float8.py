"""fp8 e4m3: a float of 4 exponent and 3 mantissa bits; the block's largest magnitude becomes 448, the largest one.

The code is the byte of ``torch.float8_e4m3fn``: sign, exponent + 7, mantissa; below 2**-6 multiples of 2**-9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memopt.kernels import math as km
from memopt.kernels.codecs.base import BIAS, Codec, register_codec


@dataclass(frozen=True)
class E4M3(Codec):
    """sign * mantissa * 2**exponent, relative to scale / 448."""

    name: str = "e4m3"
    bits: int = 8
    signed: bool = True
    unit: float = 448.0

    def encode(self, x: Any, inverse: Any, noise: Any | None) -> Any:
        a = x * inverse
        m = km.minimum(km.abs(a), self.unit)
        exponent = km.maximum(km.exponent(m), -6.0)
        units = m * km.power_of_two(3.0 - exponent)  # 8 to 16, or 0 to 8 below 2**-6
        if noise is None:
            units = (units + BIAS) - BIAS
        else:
            low = km.floor(units)
            units = km.where(units - low > noise + 0.5, low + 1.0, low)
        code = 8.0 * (exponent + 6.0) + units  # 16 units carry into the exponent by themselves
        return km.where(a < 0.0, code + 128.0, code) + BIAS

    def decode(self, code: Any, scale: Any) -> Any:
        negative = code >= 128.0
        rest = km.where(negative, code - 128.0, code)
        field = km.floor(rest * 0.125)
        units = rest - 8.0 * field + km.where(field > 0.0, 8.0, 0.0)
        value = units * km.power_of_two(km.maximum(field, 1.0) - 10.0) * (1.0 / 448)
        return km.where(negative, -value, value) * scale


register_codec(E4M3())
