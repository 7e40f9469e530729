# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Device functions of the printed kernels: no inline assembly and no vendor library, so that every target has them.

INTERPRET is true under TRITON_INTERPRET=1, whose casts to bfloat16 truncate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memopt.kernels.losses.triton_math import round_to


@triton.jit
def sign_of(x):
    """-1, 0 or 1."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def copy_sign(x, like):
    """The magnitude of x with the sign of ``like``."""
    size = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return (size | (like.to(tl.uint32, bitcast=True) & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(x):
    """floor(log2(x)) of a normal x > 0."""
    return ((x.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 127).to(tl.float32)


@triton.jit
def power_of_two(x):
    """2**x for a whole x from -126 to 127."""
    return ((x.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mix64(x):
    """The output function of SplitMix64; uint64."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def base_key(step_key, number):
    """The key of one parameter in the step that has this key; uint64 (1,)."""
    nothing = tl.zeros([1], tl.uint64)
    return mix64((nothing + step_key.to(tl.uint64)) ^ (nothing + number.to(tl.uint64)))


@triton.jit
def random_words(base, row_start, place, draw: tl.constexpr):
    """uint32 words: see memopt/kernels/hashing.py. ``row_start`` (R, 1) global, ``place`` (R, WIDTH) in the row."""
    start = row_start.to(tl.uint64)
    key = mix64(base[None, :] ^ ((start >> 32) * 2 + 1 + (draw << 33)))
    h = (start.to(tl.uint32) + place.to(tl.uint32)) * 0x9E3779B1 + (key >> 32).to(tl.uint32)
    return (h ^ (h >> 14)) * 0x4DAD971D


@triton.jit
def noise_of(word, ODD: tl.constexpr):
    """The noise of a slot for codecs, in [-1/2, 1/2)."""
    bits = (word >> 9) if ODD else (word & 0x7FFFFF)
    return (bits | 0x3F800000).to(tl.float32, bitcast=True) - 1.5


@triton.jit
def half_of(word, ODD: tl.constexpr):
    """The 16 bits of a slot."""
    return (word >> 16) if ODD else (word & 0xFFFF)


@triton.jit
def step_down(x, d):
    """The positive x, one place of its last bit lower where d is negative."""
    return (x.to(tl.int32, bitcast=True) + (d.to(tl.int32, bitcast=True) >> 31)).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(largest, TOP: tl.constexpr):
    """Scale, lift and inverse of blocks from their largest magnitude as bits: see quantize_torch.py."""
    bad = largest >= 0x7F800000
    scale = tl.where(bad, float("nan"), largest.to(tl.float32, bitcast=True))
    lift = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, 1.0)
    safe = tl.where(bad | (scale == 0.0), 1.0, scale * lift)
    inverse = tl.where(bad | (scale == 0.0), 0.0, tl.div_rn(tl.full(safe.shape, TOP, tl.float32), safe))
    return scale, tl.where(bad, 0.0, lift), inverse


@triton.jit
def store_rounded(pointer, value, mask, half, NOISY: tl.constexpr, INTERPRET: tl.constexpr):
    """Stores float32 values as the pointer's type: to nearest, or at random by the 16 bits of ``half``."""
    element: tl.constexpr = pointer.dtype.element_ty
    if NOISY and element == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        up = ((bits + half) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(tl.abs(value) < float("inf"), up, value)
    if NOISY and element == tl.float16:
        bits = value.to(tl.uint32, bitcast=True) & 0x7F800000
        exponent = tl.maximum(bits.to(tl.float32, bitcast=True), 6.103515625e-05).to(tl.uint32, bitcast=True)
        cell = (exponent - 0x05000000).to(tl.float32, bitcast=True)
        scaled = value * (0x84000000 - exponent).to(tl.float32, bitcast=True)
        low = tl.floor(scaled)
        up = tl.where((half.to(tl.float32) + 0.5) * 1.52587890625e-05 < scaled - low, 1.0, 0.0)
        value = tl.where(tl.abs(value) < float("inf"), (low + up) * cell, value)
    tl.store(pointer, round_to(value, element, INTERPRET), mask=mask)
