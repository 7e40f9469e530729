"""The layers in C++ for the CPU: float32, bfloat16 and float16; contiguous tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memopt import native_build
from memopt.kernels import hashing
from memopt.kernels.layers.norms_torch import Kept
from memopt.kernels.native.cpp import CPP_TYPES, header, read

LAYERS = ("gated", "masks", "norms")
KINDS = {"silu": 0, "gelu_none": 1, "gelu_tanh": 2}
PARTS = 16  # into which rows are cut for the sums over them: see layers.cpp


class _Norm(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("D", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("inverse", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled layers; None where there is no compiler."""
    return native_build.build("layers", header() + read("layers.cpp"))


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See ``gated_torch``."""
    out = torch.empty_like(gate)
    _call("gated_forward", gate.dtype)(KINDS[activation], *_at(gate, up, out), *_size(gate))
    return out


def gated_backward(of_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See ``gated_torch``."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(gate)
    tensors = (of_out.to(gate.dtype), gate, up, of_gate, of_up)
    _call("gated_backward", gate.dtype)(KINDS[activation], *_at(*tensors), *_size(gate))
    return of_gate, of_up


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``norms_torch``."""
    y, R = torch.empty_like(x), x.numel() // x.shape[-1]
    mean, inverse = torch.empty(R if centred else 0), torch.empty(R)
    about, alive = _norm(x, weight, bias, mean, inverse, eps, centred)
    _call("norm_forward", x.dtype)(ctypes.byref(about), *_at(x, y))
    del alive
    return y, mean, inverse


def norm_backward(of_y: Tensor, k: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """See ``norms_torch``."""
    of_x, D = torch.empty_like(k.rows), k.rows.shape[-1]
    sums, few = torch.zeros(PARTS, 2, D, dtype=torch.float64), torch.zeros(PARTS, 2, D)
    about, alive = _norm(k.rows, k.weight, k.bias, k.mean, k.inverse, 0.0, k.centred)
    of_y = of_y.to(k.rows.dtype)
    function = _call("norm_backward", k.rows.dtype)
    function(ctypes.byref(about), *_at(of_y, k.rows), int(k.is_output), *_at(of_x, sums, few))
    del alive
    return of_x, sums[:, 0].sum(0).float(), sums[:, 1].sum(0).float()


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``masks_torch``."""
    y, packed = torch.empty_like(x), torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
    _call("relu", x.dtype)(*_at(x, y, packed), *_size(x))
    return y, packed


def masked(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    """See ``masks_torch``."""
    y = torch.empty_like(x)
    _call("masked", x.dtype)(*_at(x, packed), ctypes.c_float(scale), *_at(y), *_size(x))
    return y


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """See ``masks_torch``."""
    y, key = torch.empty_like(x), hashing.base_key(seed, 0, 0)
    below = min(round(p * 2**32), 2**32 - 1)  # what C++ compares 32-bit words with
    how = (ctypes.c_uint64(key), ctypes.c_uint64(below), ctypes.c_float(1 / (1 - p)))
    _call("dropout", x.dtype)(*_at(x), *how, *_at(y), *_size(x))
    return y


def pack(flags: Tensor) -> Tensor:
    """See ``masks_torch``."""
    packed = torch.empty(-(-flags.shape[0] // 8), dtype=torch.uint8)
    _call("pack_bits")(*_at(flags, packed), *_size(flags))
    return packed


def unpack(packed: Tensor, out: Tensor) -> None:
    """See ``masks_torch``."""
    _call("unpack_bits")(*_at(packed, out), *_size(out))


def _call(name: str, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    function = getattr(library(), f"{name}_{CPP_TYPES[dtype]}" if dtype else name)
    function.restype = None
    return function  # type: ignore[no-any-return]


def _at(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _size(tensor: Tensor) -> tuple[ctypes.c_int64, int]:
    return ctypes.c_int64(tensor.numel()), native_build.threads()


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float, centred: bool
) -> tuple[_Norm, list[Tensor | None]]:
    """The C++ structure, and the tensors that must stay alive during the call."""
    alive = [None if t is None else t.detach().float().contiguous() for t in (weight, bias)]
    places = [None if t is None else t.data_ptr() for t in (*alive, mean if centred else None, inverse)]
    D = x.shape[-1]
    return _Norm(x.numel() // D, D, *places, eps, native_build.threads()), alive
