"""Checks the tensors of a vocabulary loss against each other; every message names argument and value."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    logit_scale: float | Tensor | None,
) -> Tensor | None:
    """Raises TypeError or ValueError for what does not fit; returns ``logit_scale`` as a scalar tensor or None."""
    named = {"hidden": hidden, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    for name, tensor in named.items():
        optional = name in ("bias", "class_weight")
        if not isinstance(tensor, Tensor) and not (optional and tensor is None):
            expected = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{name} must be {expected}, got {type(tensor).__name__}")
        if tensor is None:
            continue
        check_dense(name, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, but hidden is on {hidden.device}; move it there")
    check_pair(hidden, weight)
    V = weight.shape[0]
    leading = tuple(hidden.shape[:-1])
    if target.is_floating_point():
        if tuple(target.shape) != (*leading, V):
            raise ValueError(
                f"target with probabilities must have shape {(*leading, V)} (hidden's leading shape, then the "
                f"vocabulary), got {tuple(target.shape)}; class indices must be int64"
            )
        if target.requires_grad:
            raise ValueError("target probabilities get no gradient here; pass target.detach()")
    elif target.dtype != torch.int64:
        raise ValueError(f"target must be int64 entries or floating probabilities, got {target.dtype}; use .long()")
    elif tuple(target.shape) != leading:
        raise ValueError(f"target must have hidden's leading shape {leading}, got {tuple(target.shape)}")
    for name, tensor in (("bias", bias), ("class_weight", class_weight)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (V,):
            raise ValueError(f"{name} must have shape ({V},), one number per row of weight, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError("class_weight gets no gradient here; pass class_weight.detach()")
    return check_scale(logit_scale, hidden)


def check_dense(name: str, tensor: Tensor) -> None:
    """ValueError for a sparse, nested or distributed tensor, whose memory is not what the kernels take it for."""
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}; use .to_dense()")
    if type(tensor).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor; pass {name}.full_tensor(), or local rows of the vocabulary and process_group"
        )


def check_pair(hidden: Tensor, weight: Tensor) -> None:
    """``hidden`` (..., H) and ``weight`` (V, H) of one dtype, or the one that autocast makes of them."""
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (vocabulary, features), got {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must end in weight's {weight.shape[1]} features, got hidden {tuple(hidden.shape)} and weight "
            f"{tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"weight must have at least one row and one feature, got {tuple(weight.shape)}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    if hidden.dtype != weight.dtype and autocast_dtype(hidden.device) is None:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one of them, or use autocast")


def check_group(process_group: object) -> None:
    """TypeError for what is not a process group, None aside."""
    if process_group is None:
        return
    import torch.distributed as dist

    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {process_group!r}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast wants for products on this device, None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Our own arithmetic: autocast would round what is meant to be float32."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def refuse_second_derivatives(what: str) -> None:
    """RuntimeError in a backward that is itself recorded: gradients made in forward would count as constants there."""
    nested = torch._C._functorch.get_interpreter_stack()
    if (nested is None and torch.is_grad_enabled()) or (nested is not None and len(nested) > 1):
        raise RuntimeError(f"{what} has first derivatives only; use the plain loss on all logits for higher ones")


def check_scale(logit_scale: float | Tensor | None, like: Tensor) -> Tensor | None:
    """``logit_scale`` as a scalar tensor on the device of ``like``, None for none."""
    if logit_scale is None:
        return None
    if isinstance(logit_scale, Tensor):
        check_dense("logit_scale", logit_scale)
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale must be one number, got a tensor of shape {tuple(logit_scale.shape)}")
        if logit_scale.device != like.device:
            raise ValueError(f"logit_scale is on {logit_scale.device}, but hidden is on {like.device}; move it there")
        return logit_scale
    if isinstance(logit_scale, bool) or not isinstance(logit_scale, Real):
        raise TypeError(f"logit_scale must be a number, a scalar tensor or None, got {type(logit_scale).__name__}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), float(logit_scale), dtype=dtype, device=like.device)
