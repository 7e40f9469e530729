"""The choice of the implementation that carries a layer out."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from memopt.kernels.backend import choose_backend
from memopt.kernels.quantized import FLOATS


def implementation(x: Tensor, layer: str) -> ModuleType:
    """The module that carries ``layer`` out for tensors like ``x``; all of them have the same functions."""
    chosen = choose_backend(x.device) if x.dtype in FLOATS or not x.is_floating_point() else "torch"
    if chosen == "native":
        from memopt.kernels.layers import native

        if layer in native.LAYERS and native.library() is not None:
            return native
    return importlib.import_module(f"memopt.kernels.layers.{layer}_{'triton' if chosen == 'triton' else 'torch'}")
