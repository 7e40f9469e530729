"""SwiGLU and GEGLU that keep their two inputs and make the activation again in backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.kernels.layers.pieces import check_float, opmath, pieces, refuse_recorded_backward


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in float32, rounded once.

    Args:
        gate, up: one shape and dtype.

    Returns:
        The product, same shape and dtype.

    Raises:
        ValueError, TypeError: inputs that do not fit.

    Cost: keeps two tensors where ``F.silu(gate) * up`` keeps three; one more exponential per element in backward.
    """
    return _gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up, with ``approximate`` "none" or "tanh" as in ``F.gelu``; otherwise as :func:`swiglu`."""
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


def _activate(wide: Tensor, activation: str) -> Tensor:
    return F.silu(wide) if activation == "silu" else F.gelu(wide, approximate=activation[5:])


def _slope(wide: Tensor, activation: str) -> Tensor:
    """The derivative of the activation."""
    one = torch.ones_like(wide)
    if activation == "silu":
        slope: Tensor = torch.ops.aten.silu_backward(one, wide)
    else:
        slope = torch.ops.aten.gelu_backward(one, wide, approximate=activation[5:])
    return slope


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        flat_gate, flat_up, flat = gate.reshape(-1), up.reshape(-1), out.view(-1)
        for part in pieces(flat.shape[0], 1):
            wide = flat_gate[part].to(opmath(gate))
            flat[part] = _activate(wide, activation) * flat_up[part]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.activation = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_recorded_backward("swiglu and geglu")
        gate, up = ctx.saved_tensors
        of_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        of_up = torch.empty_like(of_gate)
        flat_gate, flat_up, flat = gate.reshape(-1), up.reshape(-1), of_out.reshape(-1)
        for part in pieces(flat.shape[0], 1):
            wide, g = flat_gate[part].to(opmath(gate)), flat[part].to(opmath(gate))
            of_up.view(-1)[part] = g * _activate(wide, ctx.activation)
            of_gate.view(-1)[part] = g * flat_up[part] * _slope(wide, ctx.activation)
        return of_gate, of_up, None
