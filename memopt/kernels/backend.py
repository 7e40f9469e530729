"""Which implementation runs: plain torch, native C++ (CPU) or Triton (GPU)."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

BACKENDS = ("torch", "triton", "native")


def choose_backend(device: torch.device) -> str:
    """``"native"`` on a CPU with a C++ compiler, ``"triton"`` on CUDA, ROCm and XPU, else ``"torch"``.

    ``MEMOPT_KERNELS=torch|triton|native`` forces one.

    Args:
        device: where the tensors are.

    Raises:
        ValueError: the one that is forced is unknown or cannot run on the device.
    """
    forced = os.environ.get("MEMOPT_KERNELS", "")
    kind = device.type
    if not forced:
        if kind == "cpu":
            return "native"
        return "triton" if kind in ("cuda", "xpu") and _has_triton() else "torch"
    if forced not in BACKENDS:
        raise ValueError(f"MEMOPT_KERNELS must be one of {', '.join(BACKENDS)}, got {forced!r}")
    if kind == "meta":
        return "torch"
    if forced == "native" and kind != "cpu":
        raise ValueError(f"MEMOPT_KERNELS=native runs on cpu tensors only, got a tensor on {device}; unset it")
    if forced == "triton" and kind == "cpu" and not interpreting():
        raise ValueError("MEMOPT_KERNELS=triton on cpu tensors needs TRITON_INTERPRET=1; unset MEMOPT_KERNELS")
    return forced


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
