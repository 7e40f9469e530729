"""The layers' Triton kernels in the interpreter against their oracles; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.loss_cases import check_as_close

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

NOTHING = 2.0**-126  # no sigmoid in float32 is smaller, but for 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both(layer: str) -> tuple[ModuleType, ModuleType]:
    """The Triton implementation of a layer and its oracle."""
    made = (importlib.import_module(f"memopt.kernels.layers.{layer}_{kind}") for kind in ("triton", "torch"))
    ours, plain = made
    return ours, plain


def wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def close(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """No further than the oracle from what the oracle makes of the same inputs in float64."""
    assert ours.dtype == plain.dtype
    assert truth.dtype == torch.float64
    if ours.numel():
        check_as_close(ours, plain, truth)
    assert ours.shape == plain.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_none", "gelu_tanh"])
def test_gated(activation: str, dtype: torch.dtype) -> None:
    ours, plain = both("gated")
    for shape in ((7, 33), (), (0, 4), (3, 30000)):
        of_out, gate, up = (torch.randn(shape).to(dtype) for _ in range(3))
        gate = 6 * gate
        inputs = (of_out, gate, up)
        runs = ((ours, inputs), (plain, inputs), (plain, tuple(map(wide, inputs))))
        close(*(module.gated(*given[1:], activation) for module, given in runs))
        for values in zip(*(module.gated_backward(*given, activation) for module, given in runs), strict=True):
            close(*values)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinity and NaN
@pytest.mark.parametrize("activation", ["silu", "gelu_none", "gelu_tanh"])
def test_gated_at_the_ends(activation: str) -> None:
    """The limits to the last place, but for what the smallest sigmoid leaves of a large input; NaN stays NaN."""
    ours, plain = both("gated")
    ends = torch.tensor([-1e4, -100.0, 100.0, 1e4, 0.0])
    ones = torch.ones(5)
    made = []
    for module, dtype in ((ours, torch.float32), (plain, torch.float64)):
        x, one = ends.to(dtype), ones.to(dtype)
        made.append([module.gated(x, one, activation), *module.gated_backward(one, x, one, activation)])
    for value, truth in zip(*made, strict=True):
        largest = ends.double().abs().clamp_min(1) ** 3  # that a slope multiplies a sigmoid with: gelu_tanh's
        assert ((value.double() - truth).abs() <= NOTHING * largest).all()
    assert ours.gated(torch.full((1,), float("nan")), ones[:1], activation).isnan().all()


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
        exact = plain.norm(wide(x), wide(weight), wide(bias), 1e-5, centred)
        for values in zip(ours.norm(x, weight, bias, 1e-5, centred), (y, mean, inverse), exact, strict=True):
            close(*values)
        parts = (y if keep_output else x, weight, bias, mean, inverse)
        kept = plain.Kept(*parts, keep_output, centred)
        exactly = plain.Kept(*map(wide, parts), keep_output, centred)
        gradients = (ours.norm_backward(of_y, kept), plain.norm_backward(of_y, kept))
        for values, wanted in zip(
            zip(*gradients, plain.norm_backward(wide(of_y), exactly), strict=True),
            (True, weight is not None, bias is not None),
            strict=True,
        ):
            if wanted:
                close(*values)


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
        assert torch.equal(ours.masked(x, packed, 1.25), plain.masked(x, packed, 1.25))
        assert torch.equal(ours.dropout(x, 0.3, 12345), plain.dropout(x, 0.3, 12345))
    y = ours.relu(torch.tensor([float("nan"), -0.0, float("-inf"), float("inf")]))[0]
    assert y[0].isnan()
    assert torch.equal(y[1:], torch.tensor([0.0, 0.0, float("inf")]))


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
            first, second, exact = x.clone(), x.clone(), x.double()
            ours.rotate_(first, cos, sin, interleaved, back)
            plain.rotate_(second, cos, sin, interleaved, back)
            plain.rotate_(exact, wide(cos), wide(sin), interleaved, back)
            close(first, second, exact)
    x = torch.randn(5, 2, 8).to(dtype)
    made = [y.transpose(0, 1) for y in (x.clone(), x.clone(), x.double())]  # not contiguous
    for module, y in zip((ours, plain, plain), made, strict=True):
        angles = (torch.full((5, 4), angle, dtype=torch.float32).to(y.dtype) for angle in (0.6, 0.8))
        module.rotate_(y, *angles, interleaved, False)
    close(*made)
