"""SwiGLU and GEGLU that keep their two inputs and make the activation again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memopt.kernels.layers.choosing import implementation
from memopt.kernels.layers.pieces import check_float, refuse_recorded_backward


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in float32, rounded once.

    Args:
        gate: a tensor in float32, bfloat16 or float16.
        up: of its shape and dtype.

    Returns:
        The product, same shape and dtype.

    Raises:
        ValueError, TypeError: inputs that do not fit.

    Cost: keeps two tensors where ``F.silu(gate) * up`` keeps three; one more exponential per element in backward.
    """
    return _gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up, in float32, rounded once; cost and errors as for :func:`swiglu`.

    Args:
        gate: a tensor in float32, bfloat16 or float16.
        up: of its shape and dtype.
        approximate: "none" or "tanh", as in ``F.gelu``.

    Returns:
        The product, same shape and dtype.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return _gated(gate, up, f"gelu_{approximate}")


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check_float("gate", gate)
    check_float("up", up)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gate and up must agree in shape, dtype and device, got {tuple(gate.shape)} {gate.dtype} on {gate.device} "
            f"and {tuple(up.shape)} {up.dtype} on {up.device}"
        )
    result: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return result


@torch.library.custom_op("memopt::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up; ``activation`` is "silu", "gelu_none" or "gelu_tanh"."""
    made: Tensor = implementation(gate, "gated").gated(gate.contiguous(), up.contiguous(), activation)
    return made


@torch.library.custom_op("memopt::gated_backward", mutates_args=())
def gated_backward(of_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of ``gate`` and ``up``."""
    inputs = (of_out.contiguous(), gate.contiguous(), up.contiguous())
    of_gate, of_up = implementation(gate, "gated").gated_backward(*inputs, activation)
    return of_gate, of_up


@gated.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@gated_backward.register_fake
def _(of_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    of_gate, of_up = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    return of_gate, of_up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        out: Tensor = gated(gate, up, activation)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.activation = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_recorded_backward("swiglu and geglu")
        with torch.no_grad():  # torch.func.grad records, and registered operations cannot
            of_gate, of_up = gated_backward(of_out, *ctx.saved_tensors, ctx.activation)
        return of_gate, of_up, None
