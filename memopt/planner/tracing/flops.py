"""What one dispatched operation computes, moves and is: FLOPs, bytes read and written, randomness.

FLOPs come from torch's own formulas (``torch.utils.flop_counter``), a multiply-add counted as two; operations without
a formula count none, their time is the bytes they move. Bytes are those of the tensors, not of the storages behind
them: a view of a tenth of a buffer moves a tenth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from memopt.planner.silent_writes import silent_writes
from memopt.planner.tracking import tensors_in

_GATHERS = frozenset({"embedding", "index", "index_select", "gather", "take"})


def short_name(func: Any) -> str:
    """``aten::add_.Tensor`` to ``add_``."""
    return str(func._schema.name).split("::")[-1]


def count_flops(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Floating-point operations of one call; 0 where torch has no formula. Causal attention computes half."""
    name = short_name(func)
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        shapes = [tensor.shape for tensor in args[:3]]
        count = flop_counter.sdpa_flop_count(*shapes)  # type: ignore[no-untyped-call]
    elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        shapes = [tensor.shape for tensor in args[:4]]
        count = flop_counter.sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    elif name == "_grouped_mm":  # each row of the operand with rows of tokens meets one group's matrix
        first, second = args[:2]
        count = 2 * (first.numel() * second.shape[-1] if first.dim() == 2 else second.numel() * first.shape[-2])
    else:
        formula = flop_counter.flop_registry.get(func._overloadpacket)
        count = 0 if formula is None else formula(*args, **kwargs, out_val=output)
    if count and "attention" in name and _argument(func, args, kwargs, "is_causal"):
        count //= 2
    return int(count)


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """The value of an operation's argument by name, its default where it was left out, None where there is none."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    return None


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements; expanded dimensions count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def moved_bytes(func: Any, args: Any, kwargs: Any, output: Any) -> tuple[int, int]:
    """Bytes that an operation, not a view, reads and writes."""
    outputs = list(tensors_in(output, 4))
    written = sum(tensor_bytes(tensor) for tensor in outputs) or sum(
        tensor_bytes(tensor) for tensor in mutated(func, args, kwargs)
    )
    inputs = {id(tensor): tensor for tensor in tensors_in((args, kwargs), 4)}.values()
    if short_name(func) in _GATHERS:
        return written + sum(tensor_bytes(tensor) for tensor in inputs if not tensor.is_floating_point()), written
    return sum(tensor_bytes(tensor) for tensor in inputs), written


def mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes in place, by its schema or without saying so."""
    found = list(tensors_in(silent_writes(func._schema.name, args)))
    if not func._schema.is_mutable:
        return found
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found.extend(tensors_in(value, 4))
    return found


def is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the operation draws random numbers in this call (a dropout of 0 does not)."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for name in ("dropout_p", "p"):
        value = _argument(func, args, kwargs, name)
        if value is not None:
            return not (isinstance(value, (int, float)) and value == 0)
    return True
