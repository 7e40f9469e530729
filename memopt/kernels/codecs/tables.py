"""Maps of 16 values: nf4, 4-bit dynamic exponent, 4-bit linear without zero.

======= ================================================== ==========================================================
name    values / scale                                    from
======= ================================================== ==========================================================
nf4     16 quantile means of a normal distribution        QLoRA (2305.14314), appendix E; the table of bitsandbytes
de4     0, 1 and +- (three decades of 1, 2, 4 values)     dynamic exponent of "Memory efficient optimizers with 4-bit
                                                          states" (2309.01507); bitsandbytes' dynamic map of 4 bits
linear4 k / 16, k = 1 .. 16                               the same paper, for second moments
======= ================================================== ==========================================================

The code of a value is the number of turning points below it, counted by 15 comparisons.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from memopt.kernels import math as km
from memopt.kernels.codecs.base import BIAS, Codec, register_codec
from memopt.kernels.codecs.dynamic import dynamic_levels
from memopt.kernels.codecs.rounding import below, turning_points

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Table(Codec):
    """Codes into 16 ascending values."""

    block: int = 128
    name: str = ""
    bits: int = 4
    signed: bool = True
    levels: tuple[float, ...] = ()

    def encode(self, x: Any, inverse: Any, noise: Any | None) -> Any:
        a = x * inverse
        if noise is None:
            return _count(a, turning_points(self.levels))
        # The first level with a neighbour above; below the lowest level everything rounds up to it.
        low = _count(a, tuple(below(v) for v in self.levels[1:-1]))
        gaps = (*(high - base for base, high in itertools.pairwise(self.levels)), 0.0)
        turn = km.take(self.levels, low - BIAS) + (noise + 0.5) * km.take(gaps, low - BIAS)
        return km.where(a > turn, low + 1.0, low)

    def decode(self, code: Any, scale: Any) -> Any:
        return km.take(self.levels, code) * scale


def _count(a: Any, turns: tuple[float, ...]) -> Any:
    code = km.where(a > turns[0], BIAS + 1.0, BIAS)
    for turn in turns[1:]:
        code = km.where(a > turn, code + 1.0, code)
    return code


register_codec(Table(name="nf4", levels=NF4))
register_codec(Table(name="de4", levels=dynamic_levels(4, signed=True)))
register_codec(Table(name="linear4", signed=False, levels=tuple(k / 16 for k in range(1, 17)), rounding="nearest"))
