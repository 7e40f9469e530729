"""What a recording must know of operators beyond what they return: what they overwrite, and what hangs on data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.offload.trees import operands
from memopt.planner.silent_writes import silent_writes

# These change a tensor's shape in place, which a stand-in without data cannot follow.
RESHAPES = frozenset(
    f"aten::{name}"
    for name in (
        "t_",
        "transpose_",
        "squeeze_",
        "unsqueeze_",
        "swapdims_",
        "swapaxes_",
        "resize_",
        "resize_as_",
        "set_",
    )
)
UNWRITTEN = frozenset(
    {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
)
# Return plain numbers that depend on shapes only; every other number that an operation returns depends on data.
SHAPE_ONLY = frozenset(
    f"aten::{name}"
    for name in (
        "_fused_sdp_choice",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention",
        "is_same_size",
        "sym_numel",
        "sym_size",
    )
)


def written_positions(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> tuple[int, ...]:
    """Which operands an operation overwrites, by their place in ``operands(args, kwargs)``."""
    name = func._schema.name
    changed = operands(silent_writes(name, args), {})
    if func._schema.is_mutable:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                changed.extend(operands((value,), {}))
    return tuple(n for n, tensor in enumerate(tensors) if any(tensor is other for other in changed))


def needs_data(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether what comes out is a number, or has a shape, that depends on data."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func._schema.name == "aten::index":
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return True
