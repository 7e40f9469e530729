"""The layers' Triton kernels in the interpreter against their oracles; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both(layer: str) -> tuple[ModuleType, ModuleType]:
    """The Triton implementation of a layer and its oracle."""
    made = (importlib.import_module(f"memopt.kernels.layers.{layer}_{kind}") for kind in ("triton", "torch"))
    ours, plain = made
    return ours, plain


def close(ours: Tensor, plain: Tensor) -> None:
    """To a few float32 roundings of the largest value, or to one place of 16 bits."""
    assert ours.shape == plain.shape
    assert ours.dtype == plain.dtype
    size = float(plain.float().abs().max()) if plain.numel() else 0.0
    torch.testing.assert_close(ours, plain, rtol=torch.finfo(ours.dtype).eps, atol=2e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_none", "gelu_tanh"])
def test_gated(activation: str, dtype: torch.dtype) -> None:
    ours, plain = both("gated")
    for shape in ((7, 33), (), (0, 4), (3, 30000)):
        of_out, gate, up = (torch.randn(shape).to(dtype) for _ in range(3))
        gate = 6 * gate
        close(ours.gated(gate, up, activation), plain.gated(gate, up, activation))
        for a, b in zip(*(m.gated_backward(of_out, gate, up, activation) for m in (ours, plain)), strict=True):
            close(a, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinity and NaN
@pytest.mark.parametrize("activation", ["silu", "gelu_none", "gelu_tanh"])
def test_gated_at_the_ends(activation: str) -> None:
    ours, plain = both("gated")
    ends = torch.tensor([-1e4, -100.0, 100.0, 1e4, float("nan"), 0.0])
    ones = torch.ones(6)
    for k in (0, 1):
        finite = ends[:4]
        slopes = [m.gated_backward(ones[:4], finite, ones[:4], activation)[k] for m in (ours, plain)]
        torch.testing.assert_close(*slopes)
    torch.testing.assert_close(*(m.gated(ends, ones, activation) for m in (ours, plain)), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("weighted", "keep_output"), [(False, False), (True, False), (True, True)])
def test_norm(weighted: bool, keep_output: bool, centred: bool, dtype: torch.dtype) -> None:
    ours, plain = both("norms")
    for shape in ((5, 3, 16), (7, 33), (0, 8), (3, 1000)):
        of_y, x = torch.randn(shape).to(dtype), (torch.randn(shape) + 1).to(dtype)
        weight = (0.5 + torch.rand(shape[-1])).to(dtype) if weighted else None
        bias = torch.randn(shape[-1]) if weighted and centred else None
        y, mean, inverse = plain.norm(x, weight, bias, 1e-5, centred)
        for a, b in zip(ours.norm(x, weight, bias, 1e-5, centred), (y, mean, inverse), strict=True):
            close(a, b)
        kept = plain.Kept(y if keep_output else x, weight, bias, mean, inverse, keep_output, centred)
        gradients = zip(ours.norm_backward(of_y, kept), plain.norm_backward(of_y, kept), strict=True)
        for (a, b), wanted in zip(gradients, (True, weight is not None, bias is not None), strict=True):
            if wanted:
                close(a, b)


def test_rows_too_long_for_registers() -> None:
    ours, plain = both("norms")
    for D in (ours.LONGEST + 16, ours.LONGEST_ODD + 1):
        x = torch.randn(2, D)
        for a, b in zip(ours.norm(x, None, None, 1e-5, True), plain.norm(x, None, None, 1e-5, True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(dtype: torch.dtype) -> None:
    ours, plain = both("masks")
    for shape in ((7, 33), (), (0, 4), (1,), (8,), (3, 50001)):
        x = torch.randn(shape).to(dtype)
        (y, bits), (expected, packed) = ours.relu(x), plain.relu(x)
        assert torch.equal(y, expected)
        assert torch.equal(bits, packed)
        assert torch.equal(ours.pack((x > 0).view(-1)), packed)
        flags = torch.empty(x.numel(), dtype=torch.bool)
        ours.unpack(packed, flags)
        assert torch.equal(flags, (x > 0).view(-1))
        close(ours.masked(x, packed, 1.25), plain.masked(x, packed, 1.25))
        close(ours.dropout(x, 0.3, 12345), plain.dropout(x, 0.3, 12345))
    y = ours.relu(torch.tensor([float("nan"), -0.0, float("-inf"), float("inf")]))[0]
    torch.testing.assert_close(y, torch.tensor([float("nan"), 0.0, 0.0, float("inf")]), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool, dtype: torch.dtype) -> None:
    ours, plain = both("rotary")
    for shape, angles in (
        ((2, 3, 5, 6), (5, 3)),
        ((2, 3, 5, 6), (3, 1, 3)),
        ((70, 64), (70, 32)),
        ((6,), (1,)),
        ((0, 4), (2,)),
    ):
        x = torch.randn(shape).to(dtype)
        cos, sin = torch.rand(angles), torch.rand(angles).to(dtype)
        for back in (False, True):
            first, second = x.clone(), x.clone()
            ours.rotate_(first, cos, sin, interleaved, back)
            plain.rotate_(second, cos, sin, interleaved, back)
            close(first, second)
    x = torch.randn(5, 2, 8).to(dtype)
    first, second = x.clone().transpose(0, 1), x.clone().transpose(0, 1)  # not contiguous
    for module, y in ((ours, first), (plain, second)):
        module.rotate_(y, torch.full((5, 4), 0.6), torch.full((5, 4), 0.8), interleaved, False)
    close(first, second)
