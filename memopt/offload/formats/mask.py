"""One bit per element, exact: for storages of 0 and one other value, and for what a ReLU alone saves of its output.

Dropout masks (0 and 1 / (1 - p), or booleans) come back bit for bit. The values are looked at: what is no mask is kept.
An element takes 1/8 byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.offload.formats.format import Decoder, Format, closed_over

_CHUNK = 2**20


class Mask(Format):
    """Packed bits."""

    def encode(self, flat: Tensor, width: int, signs: bool) -> Decoder | None:
        """The bits and the one value, or None if there are more values."""
        count = flat.numel()
        if count == 0:
            return None
        if signs:
            value = torch.ones((), dtype=flat.dtype, device=flat.device)
        else:
            value = flat.max() if flat.dtype is not torch.bool else torch.ones((), dtype=torch.bool, device=flat.device)
        packed = torch.empty(-(-count // 8), dtype=torch.uint8, device=flat.device)
        for start in range(0, count, _CHUNK):
            part = flat[start : start + _CHUNK]
            bits = part > 0 if signs else part != 0
            if not signs and not torch.equal(torch.where(bits, value, torch.zeros_like(value)), part):
                return None
            packed[start // 8 : start // 8 + -(-len(part) // 8)] = _pack(bits)
        return closed_over(_unpack, packed, count, value)


def _pack(bits: Tensor) -> Tensor:
    """Eight elements to a byte, the first in the lowest bit."""
    short = -len(bits) % 8
    if short:
        bits = torch.cat([bits, bits.new_zeros(short)])
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8).to(torch.uint8) * weights).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, count: int, value: Tensor) -> Tensor:
    flat = torch.empty(count, dtype=value.dtype, device=packed.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    for start in range(0, count, _CHUNK):
        stop = min(count, start + _CHUNK)
        part = packed[start // 8 : -(-stop // 8)]
        bits = ((part[:, None] >> shifts) & 1).view(-1)[: stop - start].bool()
        flat[start:stop] = torch.where(bits, value, torch.zeros_like(value))
    return flat
