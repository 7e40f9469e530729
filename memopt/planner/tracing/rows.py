"""Which operations treat rows (all dimensions of a tensor but the last) alike and apart from each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.planner.tracing.flops import short_name

# Beside those that torch tags as pointwise.
_ROW_WISE = frozenset({"_to_copy", "bernoulli", "bernoulli_", "clone", "copy_", "embedding", "native_dropout"})
_FACTORIES = frozenset({"empty_like", "ones_like", "zeros_like"})
_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm", "rms_norm"})
_ALONG_A_DIM = frozenset({"_softmax", "_log_softmax", "glu", "split", "split_with_sizes", "slice"})
_LAST_DIM_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "var", "linalg_vector_norm"})
_MATMULS = frozenset({"mm", "addmm", "_scaled_mm"})
_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "alias", "detach"})


def is_row_wise(func: Any, args: Any, output: Any, weights: frozenset[int]) -> bool:
    """Whether rows of the output follow from the same rows of the inputs alone, in the same order.

    Args:
        weights: positions among ``args`` that hold parameters, or what was made of parameters alone. A matrix product
            with one of them is row-wise, and so is what is done to them before.
    """
    name = short_name(func)
    if name in _MATMULS:
        return bool(weights & {len(args[:3]) - 1, 1})
    first = args[0] if args and isinstance(args[0], Tensor) else None
    if first is None:
        return False
    if 0 in weights and not any(isinstance(value, Tensor) and n not in weights for n, value in enumerate(args)):
        return True
    if name in _RESHAPES:
        return isinstance(output, Tensor) and output.shape[-1:] == first.shape[-1:]
    if name in _NORMS:
        return len(args) > 1 and isinstance(args[1], (list, tuple)) and len(args[1]) == 1
    if name in _ALONG_A_DIM:
        return _dim(func, args) in (-1, first.dim() - 1)
    if name in _LAST_DIM_REDUCTIONS:
        dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else args[1:2]
        return [d for d in dims if isinstance(d, int)] in ([-1], [first.dim() - 1])
    if name in _ROW_WISE or name in _FACTORIES:
        return True
    broad = any(isinstance(args[n], Tensor) and args[n].dim() > 1 for n in weights)
    return torch.Tag.pointwise in func.tags and not broad


def _dim(func: Any, args: Any) -> Any:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            return args[position] if position < len(args) else argument.default_value
    return None
