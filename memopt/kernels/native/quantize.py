"""Quantise and dequantise on the CPU through a library printed from the codec."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from memopt import native_build
from memopt.kernels.codecs import Codec
from memopt.kernels.hashing import Rounding, base_key
from memopt.kernels.native.cpp import CPP_TYPES, codec_functions, header, literal, read


class _Rows(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("flat", ctypes.c_int64),
        ("start", ctypes.c_uint64),
        ("key", ctypes.c_uint64),
        ("threads", ctypes.c_int),
    )


def quantize(x: Tensor, codes: Tensor, scales: Tensor, codec: Codec, rounding: Rounding) -> bool:
    """Writes codes and scales like the oracle's; False where the library cannot be built."""
    library = _library(codec, rounding.kind)
    if library is None:
        return False
    x = x.contiguous()
    blocks = codec.blocks(x.shape)
    if x.numel():
        key = base_key(rounding.seed, rounding.step, rounding.number)
        rows = _Rows(blocks.rows, blocks.row_length, blocks.flat, rounding.offset, key, native_build.threads())
        function = getattr(library, f"quantize_{CPP_TYPES[x.dtype]}")
        function(rows, *(ctypes.c_void_p(t.data_ptr()) for t in (x, codes, scales)))
        torch.autograd.graph.increment_version((codes, scales))
    return True


def dequantize(codes: Tensor, scales: Tensor, codec: Codec, out: Tensor) -> bool:
    """Writes into ``out``, which is contiguous; False where the library cannot be built."""
    library = _library(codec, codec.rounding)
    if library is None:
        return False
    blocks = codec.blocks(out.shape)
    if out.numel():
        codes, scales = codes.contiguous(), scales.contiguous()
        rows = _Rows(blocks.rows, blocks.row_length, blocks.flat, 0, 0, native_build.threads())
        function = getattr(library, f"dequantize_{CPP_TYPES[out.dtype]}")
        function(rows, *(ctypes.c_void_p(t.data_ptr()) for t in (out, codes, scales)))
        torch.autograd.graph.increment_version(out)
    return True


@functools.lru_cache(maxsize=64)
def _library(codec: Codec, rounding: str) -> ctypes.CDLL | None:
    text, parts = codec_functions(codec, rounding, "0")
    sets = " ".join(f"c[{i}] = splat({part});" for i, part in enumerate(parts))
    source = (
        f"{header()}enum {{ BLOCK = {codec.block}, BITS = {codec.bits}, N_PARTS = {len(parts)} }};\n"
        f"const bool NOISY = {str(rounding == 'stochastic').lower()};\n"
        f"const float TOP = {literal(codec.top(rounding))};\n"
        f"{text}INLINE void scale_parts(float scale, vf* c) {{ {sets} }}\n{read('quantize.hpp')}"
    )
    library = native_build.build(f"quantize-{codec.name}", source)
    if library is not None:
        for name in CPP_TYPES.values():
            for verb in ("quantize", "dequantize"):
                getattr(library, f"{verb}_{name}").restype = None
    return library
