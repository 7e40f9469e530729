"""Which calls logits that are not there yet answer without being computed: questions, and what there is a rule for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RULES: dict[Any, Callable[..., Any]] = {}
STORAGE = frozenset({Tensor.untyped_storage})


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names if hasattr(Tensor, name)}


def _methods(*names: str) -> set[Any]:
    return {getattr(owner, name) for owner in (Tensor, torch) for name in names if hasattr(owner, name)}


ANSWERED: frozenset[Any] = frozenset(
    _getters(
        "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "is_cuda", "is_cpu", "is_xpu",
        "is_mps", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn", "is_nested",
        "requires_grad", "grad_fn", "grad", "is_leaf", "retains_grad", "output_nr", "_backward_hooks", "_base",
    )
    | _methods(
        "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "get_device",
        "is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_inference", "is_same_size", "__len__",
        "register_hook", "retain_grad", "_is_view",
    )
)  # fmt: skip


def rule(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a rule for calls of these functions."""

    def register(handle: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(funcs, handle))
        return handle

    return register
