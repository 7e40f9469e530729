"""The oracle of the rotary embedding: plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> None:
    """Turns the pairs of ``x`` in place by the angles, or by their opposites."""
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second, cosine = a.to(wide), b.to(wide), cos.to(wide)
    sine = -sin.to(wide) if back else sin.to(wide)
    turned = first * cosine - second * sine
    b.copy_(second * cosine + first * sine)
    a.copy_(turned)
