"""Traces on a machine without a GPU what would run on one: the kernels that CUDA takes where the CPU takes others.

Fake tensors of a CPU build cannot lie on a CUDA device, so a trace for CUDA runs on fake CPU tensors and puts CUDA's
choices in place: flash attention saves q, k, v, the output and its log-sum-exp (in half precision without a mask;
otherwise the memory-efficient kernel does), dropout saves one byte an element, RMSNorm one number a row, and optimizers
update all parameters at once (``foreach``). Scratch that those kernels take from the caching allocator counts too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _pop_mode_temporarily

from memopt.planner.tracking import register_scratch

_aten = torch.ops.aten
_FLASH_HEAD = 256
_CUBLAS_WORKSPACE_BYTES = 32 * 2**20


class CudaRules(TorchFunctionMode):
    """Replaces, in the model's own calls, the functions whose CUDA kernels save something else than the CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(getattr(func, "__name__", ""))
        found = NotImplemented if rule is None else rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is NotImplemented else found


def workspace_bytes() -> int:
    """What cuBLAS takes from the caching allocator with the first matrix product, on recent devices."""
    return _CUBLAS_WORKSPACE_BYTES


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if query.dim() != 4 or query.shape[-1] != value.shape[-1]:
        return NotImplemented
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and query.shape[-1] <= _FLASH_HEAD:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), -math.inf)
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    training = any(tensor.requires_grad for tensor in (query, key, value))
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, training, dropout_p, is_causal, scale=scale
    )[0]


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    """The flash kernel, whose heads are padded to a multiple of 8."""
    head = query.shape[-1]
    missing = -head % 8
    if missing:
        scale = scale or 1 / math.sqrt(head)
        query, key, value = (torch.nn.functional.pad(tensor, (0, missing)) for tensor in (query, key, value))
    output: Tensor = _aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, scale=scale)[0]
    return output[..., :head] if missing else output


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, *_: Any, **others: Any) -> Any:
    inplace = others.get("inplace", bool(_ and _[0]))
    if not training or inplace or not 0 < p < 1 or not isinstance(input, Tensor):
        return NotImplemented
    return torch.native_dropout(input, p, True)[0]


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    if weight is None:
        return NotImplemented
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    return _RMSNorm.apply(input, shape, weight, eps)  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """``_fused_rms_norm`` and its backward as the single operations that they are on CUDA; the CPU takes them apart."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: list[int], weight: Tensor, eps: float | None) -> Tensor:
        output, inverse = _as_one(_aten._fused_rms_norm.default, (input, shape, weight, eps))
        ctx.save_for_backward(input, weight, inverse)
        ctx.shape = shape
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        input, weight, inverse = ctx.saved_tensors
        arguments = (gradient, input, ctx.shape, inverse, weight, [True, True])
        d_input, d_weight = _as_one(_aten._fused_rms_norm_backward.default, arguments)
        return d_input, None, d_weight, None


def _as_one(func: Any, arguments: tuple[Any, ...]) -> Any:
    """Runs an operation that the CPU decomposes so that the innermost dispatch mode sees it whole."""
    with _pop_mode_temporarily() as mode:
        return mode.__torch_dispatch__(func, (), arguments, {})


def _flash_backward_scratch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of flash attention: dq in float32, a float32 a row, and dk, dv for each query head where heads share keys."""
    query, key = args[1], args[2]
    batch, heads, rows, head = query.shape
    padded_rows, padded_head = -(-rows // 128) * 128, -(-head // 32) * 32
    scratch = 4 * batch * heads * padded_rows * (padded_head + 1)
    if key.shape[1] != heads:
        scratch += 2 * batch * heads * key.shape[2] * head * key.element_size()
    return int(scratch)


_RULES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "dropout": _dropout,
    "rms_norm": _rms_norm,
}
register_scratch("aten::_scaled_dot_product_flash_attention_backward", _flash_backward_scratch)
