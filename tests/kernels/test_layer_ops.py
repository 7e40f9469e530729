"""The layers as registered operations: opcheck, torch.compile without a break, gradients of the compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.kernels.layers import geglu, layer_norm, packed_relu, rms_norm, rotary_, seeded_dropout, swiglu


def operations() -> dict[str, tuple[Any, ...]]:
    x, g, w = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.rand(16)
    mean, inverse = torch.randn(15), torch.rand(15)
    return {
        "gated": (x, g, "gelu_none"),
        "gated_backward": (g, x, x.flip(0), "silu"),
        "norm": (x.bfloat16(), w, None, 1e-5, True),
        "norm_backward": (g, x, w, w.flip(0), mean, inverse, False, True),
        "packed_relu": (x,),
        "masked": (x, torch.randint(0, 256, (30,), dtype=torch.uint8), 2.0),
        "pack_mask": (x > 0,),
        "unpack_mask": (torch.randint(0, 256, (30,), dtype=torch.uint8), [3, 5, 16]),
        "dropout": (x, 0.3, torch.tensor(5)),
        "rotate_": (x, torch.rand(5, 8), torch.rand(5, 8), False, True),
    }


@pytest.mark.parametrize("name", operations())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.memopt, name).default, operations()[name])


def block(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """All layers once."""
    y = rms_norm(x, w)
    y = swiglu(y, y * 2) + geglu(y, y.flip(0), "tanh")
    y = rotary_(layer_norm(packed_relu(y), w, w.sin()), cos, sin, interleaved=True)
    return seeded_dropout(y, 0.25, seed=3)


# torch's own tracing of autograd functions instantiates them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph() -> None:
    angles = torch.rand(5, 8)
    outcomes = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        x, w = torch.randn(3, 5, 16, requires_grad=True), torch.rand(16, requires_grad=True)
        y = function(x, w, angles.cos(), angles.sin())
        y.sin().sum().backward()
        outcomes.append((y.detach(), x.grad, w.grad))
    for ours, expected in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(ours, expected)
