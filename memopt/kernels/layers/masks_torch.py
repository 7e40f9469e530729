"""The oracle of the packed masks, of ReLU and of dropout: plain torch, piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels import hashing
from memopt.kernels.layers.pieces import pieces

ROW = 2**16  # draws are made row by row; where rows begin does not change them


def pack(flags: Tensor) -> Tensor:
    """(n,) booleans to (ceil(n / 8),) bytes."""
    out = torch.empty(-(-flags.shape[0] // 8), dtype=torch.uint8, device=flags.device)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    for part in pieces(out.shape[0], 8):
        bits = flags[8 * part.start : 8 * part.stop].to(torch.uint8)
        bits = torch.nn.functional.pad(bits, (0, -bits.shape[0] % 8))
        out[part] = (bits.view(-1, 8) * powers).sum(1, dtype=torch.uint8)
    return out


def unpack(packed: Tensor, out: Tensor) -> None:
    """Writes (n,) booleans."""
    for part in pieces(out.shape[0], 1):  # a piece starts at a multiple of eight
        out[part] = _bits(packed, part)


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """max(x, 0) and the bits of x > 0; contiguous x."""
    return x.clamp_min(0), pack((x > 0).view(-1))


def masked(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    """x * scale where the bit is set, else zero; contiguous x."""
    y = torch.empty_like(x)
    for part in pieces(x.numel(), 1):
        y.view(-1)[part] = torch.where(_bits(packed, part), x.view(-1)[part] * scale, 0)
    return y


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x / (1 - p) where the element's word is at least p * 2**32, else zero; contiguous x."""
    y, below = torch.empty_like(x), round(p * 2**32)
    for part in pieces(x.numel(), 8):
        rows = -(-(part.stop - part.start) // ROW)
        words = hashing.words(hashing.base_key(seed, 0, 0), part.start, rows, ROW, 0, x.device)
        kept = words.view(-1)[: part.stop - part.start] >= below
        y.view(-1)[part] = torch.where(kept, x.view(-1)[part] * (1 / (1 - p)), 0)
    return y


def _bits(packed: Tensor, part: slice) -> Tensor:
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = packed[part.start // 8 : -(-part.stop // 8)].unsqueeze(1) & powers
    return bits.ne(0).view(-1)[: part.stop - part.start]
