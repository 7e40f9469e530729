"""What the CPU's norms return for a 16-bit input and 32-bit weights, as under autocast; fake tensors say otherwise.

Statistics are 32 bits wide, and the gradient of the input has the input's type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_WEIGHT = {_aten.native_group_norm.default: 1, _aten.native_layer_norm.default: 2, _aten.native_batch_norm.default: 1}
_BACKWARD = _aten.native_group_norm_backward.default
_NARROW = (torch.bfloat16, torch.float16)


def corrected(func: Any, args: Any, output: Any) -> Any:
    """The outputs of an operation, those of the wrong type replaced."""
    if func is _BACKWARD and args[1].dtype in _NARROW and output[0] is not None:
        return _as(output[0], args[1].dtype), *output[1:]
    if func in _WEIGHT and args[0].dtype in _NARROW:
        weight = args[_WEIGHT[func]]
        if weight is not None and weight.dtype is torch.float32:
            return output[0], _as(output[1], torch.float32), _as(output[2], torch.float32)
    return output


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else torch.empty_like(tensor, dtype=dtype)
