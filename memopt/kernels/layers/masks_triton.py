# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The packed masks, ReLU and dropout in Triton.

Letters: N elements; BLOCK bytes of bits, and so 8 * BLOCK elements, per program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels import hashing
from memopt.kernels.backend import interpreting
from memopt.kernels.gpu.device import random_words
from memopt.kernels.losses.triton_math import round_to

BLOCK, WARPS = 256, 4


@triton.jit
def bits_kernel(
    x_ptr, packed_ptr, y_ptr, scale, N,
    PACKS: tl.constexpr, IS_FLAGS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """PACKS: bits of x > 0, and its positive part; else x times scale where the bit is set. IS_FLAGS: booleans."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, 8)[None, :]
    at = byte * 8 + lane
    inside = at < N
    if PACKS:
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        flags = (x != 0) if IS_FLAGS else x.to(tl.float32) > 0.0
        bits = tl.sum(flags.to(tl.int32) << lane, 1, keep_dims=True)
        tl.store(packed_ptr + byte, bits.to(tl.uint8), mask=byte * 8 < N)
        if not IS_FLAGS:
            wide = x.to(tl.float32)
            value = tl.where(wide <= 0.0, 0.0, wide)
            tl.store(y_ptr + at, round_to(value, y_ptr.dtype.element_ty, INTERPRET), mask=inside)
    else:
        set_ = (tl.load(packed_ptr + byte, mask=byte * 8 < N, other=0).to(tl.int32) >> lane) & 1
        if IS_FLAGS:
            tl.store(y_ptr + at, set_.to(tl.uint8), mask=inside)
        else:
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(set_ != 0, x * scale, 0.0)
            tl.store(y_ptr + at, round_to(value, y_ptr.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit(do_not_specialize=["key", "below"])
def dropout_kernel(x_ptr, y_ptr, key, below, scale, N, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    row_start = tl.program_id(0).to(tl.int64) * BLOCK + tl.zeros([1, 1], tl.int64)
    lane = tl.arange(0, BLOCK)[None, :]
    at = row_start + lane
    inside = at < N
    base = (tl.zeros([1], tl.int64) + key).to(tl.uint64)
    word = random_words(base, row_start, lane, 0)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(word.to(tl.int64) >= below, x * scale, 0.0)
    tl.store(y_ptr + at, round_to(value, y_ptr.dtype.element_ty, INTERPRET), mask=inside)


def pack(flags: Tensor) -> Tensor:
    """See ``masks_torch``."""
    out = torch.empty(-(-flags.shape[0] // 8), dtype=torch.uint8, device=flags.device)
    _launch(flags.view(torch.uint8), out, out, 1.0, flags.numel(), PACKS=True, IS_FLAGS=True)
    return out


def unpack(packed: Tensor, out: Tensor) -> None:
    """See ``masks_torch``."""
    _launch(packed, packed, out.view(torch.uint8), 1.0, out.numel(), PACKS=False, IS_FLAGS=True)


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``masks_torch``."""
    y, packed = torch.empty_like(x), torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)
    _launch(x, packed, y, 1.0, x.numel(), PACKS=True, IS_FLAGS=False)
    return y, packed


def masked(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    """See ``masks_torch``."""
    y = torch.empty_like(x)
    _launch(x, packed, y, scale, x.numel(), PACKS=False, IS_FLAGS=False)
    return y


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """See ``masks_torch``."""
    y, block = torch.empty_like(x), (64 if interpreting() else 1) * 1024
    key = hashing.base_key(seed, 0, 0)
    key = key - (1 << 64) if key >> 63 else key
    if x.numel():
        dropout_kernel[(triton.cdiv(x.numel(), block),)](
            x, y, key, round(p * 2**32), 1 / (1 - p), x.numel(),
            BLOCK=block, INTERPRET=interpreting(), num_warps=WARPS,
        )  # fmt: skip
    return y


def _launch(x: Tensor, packed: Tensor, y: Tensor, scale: float, count: int, *, PACKS: bool, IS_FLAGS: bool) -> None:
    block = 64 * BLOCK if interpreting() else BLOCK
    if count:
        bits_kernel[(triton.cdiv(count, 8 * block),)](
            x, packed, y, scale, count,
            PACKS=PACKS, IS_FLAGS=IS_FLAGS, BLOCK=block, INTERPRET=interpreting(), num_warps=WARPS,
        )  # fmt: skip
