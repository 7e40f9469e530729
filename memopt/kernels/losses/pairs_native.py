"""The two kernels on similarities in C++ for the CPU: float32 and bfloat16."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from memopt.kernels.losses.logits_native import DTYPES, native_source
from memopt.native_build import build, threads


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = build("pairs", native_source("pairs.cpp"))
    if library is not None:
        whole, number, real, address = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        library.memopt_column_statistics.argtypes = [
            number, address, whole, whole, whole, real, address, address, number,
        ]  # fmt: skip
        library.memopt_pair_gradient.argtypes = [
            number, address, whole, whole, whole, address, address, address, real, real, address, number,
        ]  # fmt: skip
    return library


def available(similarities: Tensor) -> bool:
    """Whether these similarities have a dtype and a layout that the library takes, and the library exists."""
    return similarities.dtype in DTYPES and similarities.stride(-1) == 1 and _library() is not None


def column_statistics_(highest: Tensor, total: Tensor, similarities: Tensor, scale: Tensor) -> None:
    """See ``pairs_torch.column_statistics_``."""
    library = _library()
    assert library is not None
    R, C = similarities.shape
    library.memopt_column_statistics(
        DTYPES[similarities.dtype],
        similarities.data_ptr(),
        similarities.stride(0),
        R,
        C,
        float(scale),
        highest.data_ptr(),
        total.data_ptr(),
        threads(),
    )


def pair_gradient_(
    similarities: Tensor, rows: Tensor, columns: Tensor, target: Tensor, coefficient: Tensor, scale: Tensor
) -> Tensor:
    """See ``pairs_torch.pair_gradient_``."""
    library = _library()
    assert library is not None
    R, C = similarities.shape
    of_scale = torch.empty(R, dtype=torch.float32)
    rows, columns, target = rows.contiguous(), columns.contiguous(), target.contiguous()
    library.memopt_pair_gradient(
        DTYPES[similarities.dtype],
        similarities.data_ptr(),
        similarities.stride(0),
        R,
        C,
        rows.data_ptr(),
        columns.data_ptr(),
        target.data_ptr(),
        float(coefficient),
        float(scale),
        of_scale.data_ptr(),
        threads(),
    )
    return of_scale
