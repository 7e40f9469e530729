"""The oracle of the quantisers: plain torch, any device, readable before fast."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.kernels import hashing
from memopt.kernels.blocks import Blocks, block_maxima
from memopt.kernels.codecs import Codec
from memopt.kernels.hashing import Rounding

# A scale below TINY makes unit / scale overflow: such blocks are computed 2**64 times larger, which is exact.
TINY, LIFT = 2.0**-60, 2.0**64


def quantize(x: Tensor, codec: Codec, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x`` in the shapes of :class:`memopt.kernels.Quantized`."""
    blocks = codec.blocks(x.shape)
    flat = x.detach().float().reshape(blocks.rows, blocks.row_length)
    noise = None
    if rounding.kind == "stochastic":
        base = hashing.base_key(rounding.seed, rounding.step, rounding.number)
        noise = hashing.noise(base, rounding.offset, blocks.rows, blocks.row_length, 0, x.device)
    codes, scales = encode_rows(flat, codec, blocks, noise)
    return codes.reshape(blocks.code_shape(x.shape, codec.bits)), scales.reshape(blocks.scale_shape)


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, ...], codec: Codec) -> Tensor:
    """The float32 tensor of this shape."""
    blocks = codec.blocks(shape)
    if blocks.rows * blocks.row_length == 0:
        return torch.zeros(shape, device=codes.device)
    rows = decode_rows(codes.reshape(blocks.rows, -1), scales.reshape(blocks.rows, -1), codec, blocks)
    return rows.reshape(shape)


def encode_rows(x: Tensor, codec: Codec, blocks: Blocks, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 (rows, row_length) to codes, uint8 (rows, row bytes), and scales (rows, per_row)."""
    scales = block_maxima(x.abs(), blocks)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    index = blocks.index(x.device)
    lift = torch.where(scales < TINY, LIFT, 1.0)
    # A tensor: torch computes number / tensor as number * (1 / tensor), which rounds twice.
    top = torch.tensor(codec.top("nearest" if noise is None else "stochastic"), dtype=torch.float32, device=x.device)
    inverse = torch.where(scales > 0, top / (scales * lift), 0.0)
    finite = torch.where(scales.isnan()[:, index], 0.0, x * lift[:, index])
    inverse = torch.where(scales.isnan(), 0.0, inverse)
    biased: Tensor = codec.encode(finite, inverse[:, index], noise)
    codes = (biased.contiguous().view(torch.int32) & 255).to(torch.uint8)
    return (codes if codec.bits == 8 else pack_rows(codes, blocks)), scales


def decode_rows(codes: Tensor, scales: Tensor, codec: Codec, blocks: Blocks) -> Tensor:
    """The inverse: float32 (rows, row_length)."""
    codes = codes if codec.bits == 8 else unpack_rows(codes, blocks)
    value: Tensor = codec.decode(codes.float(), scales[:, blocks.index(codes.device)])
    return value


def pack_rows(codes: Tensor, blocks: Blocks) -> Tensor:
    """4-bit codes to bytes, block by block: the first half of a block in low nibbles, the second in high ones."""
    pieces = []
    for start, length in _spans(blocks):
        half = (length + 1) // 2
        low, high = codes[:, start : start + half], codes[:, start + half : start + length]
        byte = low.clone()
        byte[:, : length - half] |= high << 4
        pieces.append(byte)
    return torch.cat(pieces, -1) if pieces else codes.new_zeros((codes.shape[0], 0))


def unpack_rows(packed: Tensor, blocks: Blocks) -> Tensor:
    """Bytes to 4-bit codes."""
    pieces, at = [], 0
    for _, length in _spans(blocks):
        half = (length + 1) // 2
        byte = packed[:, at : at + half]
        pieces += [byte & 15, (byte >> 4)[:, : length - half]]
        at += half
    return torch.cat(pieces, -1) if pieces else packed.new_zeros((packed.shape[0], 0))


def _spans(blocks: Blocks) -> list[tuple[int, int]]:
    whole = max(blocks.per_row - 1, 0)
    spans = [(i * blocks.block, blocks.block) for i in range(whole)]
    return [*spans, (whole * blocks.block, blocks.last)] if blocks.per_row else []
