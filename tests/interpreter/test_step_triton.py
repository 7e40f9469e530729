"""The printed Triton kernels in the interpreter against the torch oracle; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from memopt.kernels import Quantized, codec_names, dequantize_blockwise, get_codec, step
from tests.kernels.step_cases import (
    ADAMW,
    EVERYTHING,
    ODD_SHAPES,
    ROUNDING,
    SCALARS,
    SIGN,
    SMALLEST,
    SUMMING,
    Kind,
    check_parameters,
    check_state,
    codec_of,
    most_undecided,
    neighbours_differ,
    requantized,
    run_adamw,
    zeros,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Whole tiles exist from 64 * 1024 elements on, where the interpreter's programs have that size.
SHAPES = [*ODD_SHAPES, (40, 2048)]
DECODED = 28 * ROUNDING  # a fourth power of a rounded root has 14 roundings, on either side


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
    options = {"param_rounding": param_rounding, "offsets": [2**32 - 700] * len(SHAPES)}
    before, _ = run_adamw(SHAPES, kinds, dtype, grad_dtype, steps=0)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        results.append(run_adamw(SHAPES, kinds, dtype, grad_dtype, steps=1, **options))
    (params, states), (ours, our_states) = results
    for p, q, start in zip(params, ours, before, strict=True):
        check_parameters(q, p, start)
    for stored, our_stored in zip(states, our_states, strict=True):
        for a, b in zip(stored, our_stored, strict=True):
            check_state(b, a)


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
                assert neighbours_differ(plain, ours) <= most_undecided(plain)
            got = dequantize_blockwise(plain, dtype=dtype)
            torch.testing.assert_close(got, expected, rtol=max(DECODED, torch.finfo(dtype).eps), atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the infinities and NaN
def test_special_values(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 512) * torch.tensor([1.0, 1e-39, 0.0, 1e30])[:, None]
    x[0, 3], x[3, 300] = float("nan"), float("inf")
    for name in ("sq127", "sq15", "e4m3"):
        decoded = []
        for backend in ("torch", "triton"):
            monkeypatch.setenv("MEMOPT_KERNELS", backend)
            decoded.append(dequantize_blockwise(requantized(x, name)))
        torch.testing.assert_close(decoded[1], decoded[0], rtol=DECODED, atol=SMALLEST, equal_nan=True)


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
        check_parameters(ours, p, torch.ones(2, 1111))
        for (a,), (b,) in zip(states, our_states, strict=True):
            if isinstance(a, Quantized):
                assert a.scales.isfinite().all()
            check_state(b, a)


def test_every_function_and_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from float64 than twice what torch's own functions are; sums to the roundings of a tree."""
    p0, g = [torch.randn(s) for s in SHAPES], [torch.randn(s) for s in SHAPES]
    scalars = SimpleNamespace(lr=0.3, eps=1e-3)
    truth = [EVERYTHING.fn(p.double(), x.double(), (p.double(),), scalars)[0] for p, x in zip(p0, g, strict=True)]
    errors, sums = [], {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        params = [p.clone() for p in p0]
        step(EVERYTHING, params, g, [[torch.zeros(s) for s in SHAPES]], [None], vars(scalars))
        errors.append([float((p - t).abs().max()) if p.numel() else 0.0 for p, t in zip(params, truth, strict=True)])
        sums = step(SUMMING, params, g, [[zeros(s, "sq127") for s in SHAPES]], ["sq127"], {"beta1": 0.9})
    for plain, ours, t in zip(*errors, truth, strict=True):
        assert ours <= 2 * plain + ROUNDING * (float(t.abs().max()) if t.numel() else 0.0)
    for i, (p, x) in enumerate(zip(params, g, strict=True)):
        # Two roundings a term, one for each halving of the 81 920 of the largest, and some for what tiles add up.
        for name, terms in (("squares", p.double() ** 2), ("moments", (0.1 * x.double()).abs())):
            torch.testing.assert_close(sums[name][i].double(), terms.sum(), rtol=32 * ROUNDING, atol=0)
