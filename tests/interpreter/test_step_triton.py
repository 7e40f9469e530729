"""The printed Triton kernels in the interpreter against the torch oracle; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from memopt.kernels import Quantized, codec_names, dequantize_blockwise, get_codec, step
from tests.kernels.step_cases import (
    ADAMW,
    EVERYTHING,
    ODD_SHAPES,
    SCALARS,
    SIGN,
    SUMMING,
    Kind,
    codec_of,
    neighbours_differ,
    requantized,
    run_adamw,
    zeros,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Whole tiles exist from 64 * 1024 elements on, where the interpreter's programs have that size.
SHAPES = [*ODD_SHAPES, (40, 2048)]


@pytest.mark.parametrize(
    ("kinds", "dtype", "grad_dtype", "param_rounding"),
    [
        (("sq127", "root4"), F32, F32, "nearest"),
        (("sq15", "sqrt"), BF16, F32, "stochastic"),
        (("dynamic8", "dynamic8u"), F16, BF16, "stochastic"),
        ((F32, BF16), BF16, F16, "stochastic"),
        (("sq127", "sqrt"), F32, F32, "nearest"),  # two block sizes
    ],
    ids=str,
)
def test_step(
    kinds: tuple[Kind, Kind],
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    param_rounding: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        options = {"param_rounding": param_rounding, "offsets": [2**32 - 700] * len(SHAPES), "steps": 1}
        results.append(run_adamw(SHAPES, kinds, dtype, grad_dtype, **options))
    (params, states), (ours, our_states) = results
    for p, q in zip(params, ours, strict=True):
        torch.testing.assert_close(q, p, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    for stored, our_stored in zip(states, our_states, strict=True):
        for a, b in zip(stored, our_stored, strict=True):
            if isinstance(a, Quantized) and isinstance(b, Quantized):
                torch.testing.assert_close(b.scales, a.scales, rtol=1e-6, atol=0)
                assert neighbours_differ(a, b) <= 0.004
            else:
                torch.testing.assert_close(b, a, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_quantize(name: str, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((3, 2 * get_codec(name).block + 77), (301,), (), (0, 5), (70, 1024)):
        for dtype in (F32, BF16, F16):
            x = torch.randn(shape).to(dtype)
            monkeypatch.setenv("MEMOPT_KERNELS", "torch")
            plain = requantized(x, name, rounding=rounding, seed=9)
            expected = dequantize_blockwise(plain, dtype=dtype)
            monkeypatch.setenv("MEMOPT_KERNELS", "triton")
            version = x._version
            ours = requantized(x, name, rounding=rounding, seed=9)
            assert x._version == version
            assert torch.equal(ours.scales, plain.scales)
            if rounding == "nearest":
                assert torch.equal(ours.codes, plain.codes)
            else:
                assert neighbours_differ(plain, ours) <= 1e-3
            got = dequantize_blockwise(plain, dtype=dtype)
            # A fourth power of a rounded root: 14 roundings of 2**-24 on either side; in 16 bits one place.
            torch.testing.assert_close(got, expected, rtol=max(28 * 2.0**-24, torch.finfo(dtype).eps), atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the infinities and NaN
def test_special_values(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 512) * torch.tensor([1.0, 1e-39, 0.0, 1e30])[:, None]
    x[0, 3], x[3, 300] = float("nan"), float("inf")
    for name in ("sq127", "sq15", "e4m3"):
        decoded = []
        for backend in ("torch", "triton"):
            monkeypatch.setenv("MEMOPT_KERNELS", backend)
            decoded.append(dequantize_blockwise(requantized(x, name)))
        torch.testing.assert_close(decoded[1], decoded[0], rtol=1e-6, atol=3e-45, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_elements_that_are_not_finite_start_anew_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, scales and values follow the oracle; no scale is spoiled. The sign of NaN is 0, as torch's."""
    g = torch.randn(2, 1111) * torch.tensor([1.0, 1e-30])[:, None]
    g[:, [5, 400, 800, 1100]] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38])
    for kinds in (("sq127", "root4"), ("sq15", F32)):
        outcomes = []
        for backend in ("torch", "triton"):
            monkeypatch.setenv("MEMOPT_KERNELS", backend)
            p, states = torch.ones(2, 1111), [[zeros((2, 1111), kind)] for kind in kinds]
            step(ADAMW, [p], [g], states, [codec_of(k) for k in kinds], SCALARS, seed=7)
            signs = torch.ones(2, 1111)
            step(SIGN, [signs], [g], [[torch.zeros(2, 1111)]], [None], {})
            assert torch.equal(signs, torch.sign(g))
            outcomes.append((p, states))
        (p, states), (ours, our_states) = outcomes
        torch.testing.assert_close(ours, p, rtol=4e-6, atol=1e-6, equal_nan=True)
        for (a,), (b,) in zip(states, our_states, strict=True):
            if isinstance(a, Quantized) and isinstance(b, Quantized):
                assert a.scales.isfinite().all()
                torch.testing.assert_close(b.scales, a.scales, rtol=1e-6, atol=0)
                assert neighbours_differ(a, b) <= 0.004


def test_every_function_and_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    p0, g = [torch.randn(s) for s in SHAPES], [torch.randn(s) for s in SHAPES]
    outcomes = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        params = [p.clone() for p in p0]
        unused = [torch.zeros(s) for s in SHAPES]
        step(EVERYTHING, params, g, [unused], [None], {"lr": 0.3, "eps": 1e-3})
        moments = [zeros(s, "sq127") for s in SHAPES]
        sums = step(SUMMING, params, g, [moments], ["sq127"], {"beta1": 0.9})
        outcomes.append([*params, sums["squares"], sums["moments"]])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(b, a, rtol=4e-6, atol=4e-6)
