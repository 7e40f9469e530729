"""The two kernels on logits in C++ for the CPU: float32 and bfloat16, one pass over memory each."""

from __future__ import annotations

import ctypes
import functools
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from memopt.kernels.losses.logits import Logits
from memopt.native_build import build, threads

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def native_source(name: str) -> str:
    """One whole translation unit: the shared exponentials, then the kernels of a file in ``kernels/native``."""
    folder = files("memopt.kernels")
    parts = (folder.joinpath(f"native/{part}").read_text(encoding="utf-8") for part in ("exponentials.hpp", name))
    return "\n".join(parts)


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = build("logits", native_source("logits.cpp"))
    if library is not None:
        whole, number, real, address = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        head: list[Any] = [number, address, whole, whole, whole, address, real, real, address, address, whole, address]
        library.memopt_logit_statistics.argtypes = [*head, number, number, address, address, number]
        library.memopt_softmax_gradient.argtypes = [*head, address, address, number]
    return library


def available(logits: Tensor) -> bool:
    """Whether these logits have a dtype and a layout that the library takes, and the library exists."""
    return logits.dtype in DTYPES and logits.stride(-1) == 1 and _library() is not None


def logit_statistics(x: Logits, want_weighted: bool, want_expected: bool) -> tuple[Tensor, Tensor]:
    """See ``logits_torch.logit_statistics``."""
    out = torch.empty(5, x.raw.shape[0], dtype=torch.float32)
    argmax = torch.empty(x.raw.shape[0], dtype=torch.int64)
    head, alive = _head(x)
    library = _library()
    assert library is not None
    library.memopt_logit_statistics(
        *head, int(want_weighted), int(want_expected), out.data_ptr(), argmax.data_ptr(), threads()
    )
    del alive
    return out, argmax


def softmax_gradient_(x: Logits, coefficients: Tensor, want_scale: bool) -> Tensor:
    """See ``logits_torch.softmax_gradient_``."""
    scale_gradient = torch.zeros(x.raw.shape[0], dtype=torch.float32)
    head, alive = _head(x)
    coefficients = coefficients.contiguous()
    library = _library()
    assert library is not None
    of_scale = scale_gradient.data_ptr() if want_scale else None
    library.memopt_softmax_gradient(*head, coefficients.data_ptr(), of_scale, threads())
    del alive
    return scale_gradient


def _head(x: Logits) -> tuple[list[object], list[Tensor | None]]:
    """The arguments both entry points share, and the tensors that must stay alive during the call."""
    R, V = x.raw.shape
    bias, class_weight, soft = (None if t is None else t.float().contiguous() for t in (x.bias, x.class_weight, x.soft))
    target = None if x.target is None else x.target.contiguous()
    address = [None if t is None else t.data_ptr() for t in (bias, class_weight, soft, target)]
    head: list[object] = [DTYPES[x.raw.dtype], x.raw.data_ptr(), x.raw.stride(0), R, V]
    head += [address[0], float(x.scale), x.softcap, address[1], address[2], V, address[3]]
    return head, [bias, class_weight, soft, target]
