"""What a trace assumes where a model asks for the values of tensors that have none.

Fake tensors have shapes and no contents. Where Python code reads a number out of one (``.item()``, ``if tensor:``), a
trace goes on with a harmless value: 1.0 for floating-point, 0 for integers (always a valid index), False for booleans.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode


class Guesses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers the questions that fake tensors cannot; to be active right above the fake mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return _number(args[0].dtype)


def _number(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 0
