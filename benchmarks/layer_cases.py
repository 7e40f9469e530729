"""Layers forward and backward: torch's own first, then memopt's; for ``python -m benchmarks.kernels``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.kernels import geglu, layer_norm, packed_relu, rms_norm, rotary_, seeded_dropout, swiglu

Layer = Callable[..., Tensor]


def layers(
    rows: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, dict[str, Callable[[], object]]]:
    """For each layer "torch" and "memopt": functions that run it forward and backward over (rows, width)."""
    x, up, upstream = (torch.randn(rows, width, device=device).to(dtype) for _ in range(3))
    w = torch.rand(width, device=device).to(dtype)
    angles = torch.rand(rows, width // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    pairs: dict[str, tuple[tuple[Tensor, ...], Layer, Layer]] = {
        "RMSNorm": ((x, w), lambda x, w: F.rms_norm(x, (width,), w, 1e-6), rms_norm),
        "LayerNorm": ((x, w, w.clone()), lambda x, w, b: F.layer_norm(x, (width,), w, b), layer_norm),
        "SwiGLU": ((x, up), lambda g, u: F.silu(g) * u, swiglu),
        "GEGLU": ((x, up), lambda g, u: F.gelu(g) * u, geglu),
        "ReLU": ((x,), F.relu, packed_relu),
        "dropout": ((x,), lambda x: F.dropout(x, 0.1), lambda x: seeded_dropout(x, 0.1)),
        "rotary": ((x,), lambda x: plain_rotary(x, cos, sin), lambda x: rotary_(x.clone(), cos, sin)),
    }
    return {
        name: {"torch": _both_ways(plain, inputs, upstream), "memopt": _both_ways(ours, inputs, upstream)}
        for name, (inputs, plain, ours) in pairs.items()
    }


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As models write it: out of place, in float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _both_ways(layer: Layer, inputs: tuple[Tensor, ...], upstream: Tensor) -> Callable[[], object]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(layer(*leaves), leaves, upstream)
