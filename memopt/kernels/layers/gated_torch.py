"""The oracle of the gated activations: plain torch on float32 pieces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.kernels.layers.pieces import opmath, pieces


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up; contiguous inputs."""
    out = torch.empty_like(gate)
    flat_gate, flat_up, flat = gate.view(-1), up.view(-1), out.view(-1)
    for part in pieces(flat.shape[0], 1):
        flat[part] = _activate(flat_gate[part].to(opmath(gate)), activation) * flat_up[part]
    return out


def gated_backward(of_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of both inputs."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(gate)
    flat_gate, flat_up, flat = gate.view(-1), up.view(-1), of_out.view(-1)
    for part in pieces(flat.shape[0], 1):
        wide, g = flat_gate[part].to(opmath(gate)), flat[part].to(opmath(gate))
        of_up.view(-1)[part] = g * _activate(wide, activation)
        of_gate.view(-1)[part] = g * flat_up[part] * _slope(wide, activation)
    return of_gate, of_up


def _activate(wide: Tensor, activation: str) -> Tensor:
    return F.silu(wide) if activation == "silu" else F.gelu(wide, approximate=activation[5:])


def _slope(wide: Tensor, activation: str) -> Tensor:
    one = torch.ones_like(wide)
    if activation == "silu":
        slope: Tensor = torch.ops.aten.silu_backward(one, wide)
    else:
        slope = torch.ops.aten.gelu_backward(one, wide, approximate=activation[5:])
    return slope
