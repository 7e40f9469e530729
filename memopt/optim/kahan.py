"""Kahan summation for bf16 and fp16 parameters: what rounding takes off a value is kept, and given back next step.

The parameter ``p`` and a state ``c`` of the same type stand for ``p + c``. A step computes ``x = p + c`` moved by the
rule in fp32, stores ``p = round(x)`` and ``c = x - p``: twice the type's precision for 2 bytes a parameter
(Kahan, "Further remarks on reducing truncation errors", 1965).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from memopt.kernels import State, Update
from memopt.kernels.math import abs as magnitude
from memopt.kernels.math import exponent, maximum, power_of_two, where

COMPENSATION = State("compensation", signed=True)

_BITS = {torch.bfloat16: 8, torch.float16: 11}  # of the significand, the leading one included
_LOWEST = {torch.bfloat16: -100, torch.float16: -14}  # exponent below which the spacing no longer falls


def applies(rounding: str, dtype: torch.dtype) -> bool:
    """Whether a parameter of this type keeps a compensation."""
    return rounding == "kahan" and dtype in _BITS


def rounded(x: Any, dtype: torch.dtype) -> Any:
    """``x`` rounded to nearest even in ``dtype``, as fp32, by adding and taking off a large power of two.

    1.5 times 2 to the 23 times the spacing: the sum keeps no bit below the spacing, on either side of the power. Values
    beyond 2^100, infinities and NaN stay as they are.
    """
    size = magnitude(x)
    spacing = maximum(exponent(size), _LOWEST[dtype]) - (_BITS[dtype] - 1)
    large = 1.5 * power_of_two(where(size < 2.0**100, spacing + 23.0, 0.0))
    return where(size < 2.0**100, (x + large) - large, x)


@lru_cache(maxsize=256)
def compensated(update: Update, dtype: torch.dtype) -> Update:
    """The same rule with the compensation as a last state."""

    def fn(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, ...]:
        *own, lost = states
        x = p + lost
        moved, new, *sums = update.fn(x, g, tuple(own), s)
        if moved is x:
            return p, (*new, lost), *sums
        kept = rounded(moved, dtype)
        # An infinity less itself is no number: nothing is lost there.
        return kept, (*new, where(magnitude(kept) < 2.0**120, moved - kept, 0.0)), *sums

    name = f"{update.name}_kahan_{'bf16' if dtype == torch.bfloat16 else 'fp16'}"
    return replace(update, name=name, states=(*update.states, COMPENSATION), fn=fn)
