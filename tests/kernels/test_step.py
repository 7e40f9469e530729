"""The fused step: every implementation against the torch oracle and the oracle against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from memopt.kernels import step
from tests.kernels.step_cases import (
    ADAMW,
    EVERYTHING,
    ODD_SHAPES,
    ROUNDING,
    SCALARS,
    SIGN,
    SUMMING,
    Kind,
    check_against_truth,
    check_parameters,
    check_slow_decay,
    check_state,
    codec_of,
    first_step_bounds,
    run_adamw,
    value,
    zeros,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def both(monkeypatch: pytest.MonkeyPatch, *args: object, **options: object) -> list[tuple]:  # type: ignore[type-arg]
    results = []
    for backend in ("torch", "native"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        results.append(run_adamw(*args, **options))  # type: ignore[arg-type]
    return results


@pytest.mark.parametrize(
    ("kinds", "dtype", "grad_dtype", "param_rounding"),
    [
        (("sq127", "root4"), F32, F32, "nearest"),
        (("sq15", "sqrt"), BF16, F32, "stochastic"),
        (("dynamic8", "dynamic8u"), BF16, BF16, "nearest"),
        (("de4", "linear4"), F32, F32, "nearest"),
        (("sq127", "sqrt"), F16, F16, "stochastic"),
        ((F32, F32), F32, BF16, "nearest"),
        ((BF16, F16), BF16, F16, "stochastic"),
        (("e4m3", F32), F16, F32, "nearest"),
    ],
    ids=str,
)
def test_native_follows_the_oracle(
    kinds: tuple[Kind, Kind], dtype: torch.dtype, grad_dtype: torch.dtype, param_rounding: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = {"param_rounding": param_rounding, "offsets": [2**32 - 700] * len(ODD_SHAPES)}
    before, _ = run_adamw(ODD_SHAPES, kinds, dtype, grad_dtype, steps=0)
    (params, states), (ours, our_states) = both(monkeypatch, ODD_SHAPES, kinds, dtype, grad_dtype, steps=1, **options)
    for p, q, start in zip(params, ours, before, strict=True):
        check_parameters(q, p, start)
    for stored, our_stored in zip(states, our_states, strict=True):
        for a, b in zip(stored, our_stored, strict=True):
            check_state(b, a)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_plain_states_against_float64(dtype: torch.dtype) -> None:
    """Error: a dozen float32 roundings, and the rounding of the parameter after every step."""
    params, states = run_adamw(ODD_SHAPES, (F32, F32), dtype)
    generator = torch.Generator().manual_seed(1)
    truth = [torch.randn(shape, generator=generator).to(dtype).double() for shape in ODD_SHAPES]
    moments = [[torch.zeros(shape, dtype=torch.float64) for shape in ODD_SHAPES] for _ in range(2)]
    for _ in range(3):
        for i, shape in enumerate(ODD_SHAPES):
            g = torch.randn(shape, generator=generator).to(dtype).double()
            new, (moments[0][i], moments[1][i]) = ADAMW.fn(
                truth[i], g, (moments[0][i], moments[1][i]), SimpleNamespace(**SCALARS)
            )
            truth[i] = new
    for i in range(len(ODD_SHAPES)):
        # No parameter was further than 0.1 from where it ends.
        slack = 3 * 0.51 * torch.finfo(dtype).eps if dtype != F32 else 12 * 2.0**-24
        torch.testing.assert_close(params[i].double(), truth[i], rtol=slack, atol=0.1 * slack)
        for j in range(2):
            torch.testing.assert_close(states[j][i].double(), moments[j][i], rtol=12 * 2.0**-24, atol=1e-7)  # type: ignore[union-attr]


def test_every_function_of_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is torch's functions; the native kernels are no further from float64 than twice what it is."""
    p0, g = torch.randn(3, 333), torch.randn(3, 333)
    truth = EVERYTHING.fn(p0.double(), g.double(), (p0.double(),), SimpleNamespace(lr=0.3, eps=1e-3))[0]
    errors = []
    for backend in ("torch", "native"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        p, unused = p0.clone(), torch.zeros(3, 333)
        version = unused._version
        step(EVERYTHING, [p], [g], [[unused]], [None], {"lr": 0.3, "eps": 1e-3})
        errors.append(float((p.double() - truth).abs().max()))
        assert unused._version == version  # a state that the rule returns as it was is not written
    size = float(truth.abs().max())
    assert errors[0] <= 20 * ROUNDING * size  # as many roundings as the rule has functions
    assert errors[1] <= 2 * errors[0] + ROUNDING * size


@pytest.mark.usefixtures("_backend")
def test_signs_are_torchs() -> None:
    g = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 0.0, -0.0, 3.0] * 5)
    p = torch.ones(40)
    step(SIGN, [p], [g], [[torch.zeros(40)]], [None], {})
    assert torch.equal(p, torch.sign(g))


@pytest.mark.parametrize("kinds", [("sq127", "root4"), ("sq15", "sqrt"), ("e4m3", "e4m3")], ids=str)
def test_native_follows_the_oracle_over_many_blocks(kinds: tuple[Kind, Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several tiles, of whole blocks and not; some blocks are tiny, and some hold what is no number."""
    shapes, outcomes = [(2, 9984), (12600,)], []
    for backend in ("torch", "native"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        generator = torch.Generator().manual_seed(9)
        params = [torch.randn(shape, generator=generator) for shape in shapes]
        starts, grads = [p.clone() for p in params], [torch.randn(shape, generator=generator) for shape in shapes]
        grads[0][0, 512:1024] *= 1e-18
        grads[0][1, 4096] = torch.inf
        grads[1][[0, 4351, 12599]] = torch.nan
        states = [[zeros(shape, kind) for shape in shapes] for kind in kinds]
        step(ADAMW, params, grads, states, [codec_of(k) for k in kinds], SCALARS, seed=3)
        outcomes.append((params, states))
    (params, states), (ours, our_states) = outcomes
    for p, q, start in zip(params, ours, starts, strict=True):
        assert p.isnan().sum() in (1, 3)
        check_parameters(q, p, start)
    for stored, mine in zip(states, our_states, strict=True):
        for a, b in zip(stored, mine, strict=True):
            check_state(b, a)


@pytest.mark.usefixtures("_backend")
def test_second_moments_decay_however_slowly() -> None:
    check_slow_decay()


@pytest.mark.usefixtures("_backend")
def test_reductions() -> None:
    params = [torch.randn(s) for s in ODD_SHAPES]
    before = [p.clone() for p in params]
    grads = [torch.randn(s) for s in ODD_SHAPES]
    states = [[zeros(s, "sq127") for s in ODD_SHAPES]]
    sums = step(SUMMING, params, grads, states, ["sq127"], {"beta1": 0.9})
    for i, p in enumerate(params):
        assert torch.equal(p, before[i])
        # Terms of two roundings at most (1 - beta1 and its product), added in float64, and the sum rounded once.
        for name, truth in (("squares", p.double() ** 2), ("moments", (0.1 * grads[i].double()).abs())):
            torch.testing.assert_close(sums[name][i].double(), truth.sum(), rtol=3.01 * ROUNDING, atol=0)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("kinds", [("sq127", "root4"), ("sq15", "sqrt"), ("sq15", "root4")], ids=str)
def test_elements_that_are_not_finite_start_anew_alone(kinds: tuple[Kind, Kind]) -> None:
    """Everything else is, bit for bit, what it is where those gradients are zeros; tails and odd rows included."""
    outcomes = []
    for bad in (True, False):
        generator = torch.Generator().manual_seed(6)
        p, states = torch.randn(2, 1111, generator=generator), [[zeros((2, 1111), kind)] for kind in kinds]
        for number in range(3):
            g = torch.randn(2, 1111, generator=generator)
            for column, one in zip((3, 300, 700, 1110), (float("nan"), float("inf"), -float("inf"), 1e38), strict=True):
                g[1, column] = (one if number == 1 else 1e-3) if bad else 1e-3
            step(ADAMW, [p], [g], states, [codec_of(k) for k in kinds], SCALARS, seed=7, step=number)
            if bad and number == 1:
                assert not value(states[0][0])[1, [3, 300, 700, 1110]].any()
                assert value(states[1][0]).isfinite().all()
        outcomes.append([p, *(value(stored[0]) for stored in states)])
    others = torch.ones(2, 1111, dtype=torch.bool)
    others[1, [3, 300, 700, 1110]] = False
    for x, y in zip(*outcomes, strict=True):
        assert torch.equal(x[others], y[others])
    assert outcomes[0][0][1, [3, 300, 700]].isnan().all()  # infinity / infinity for two of them, as in fp32
    assert outcomes[0][0][1, 1110].isfinite()


@pytest.mark.parametrize("kinds", [("sq127", "root4"), ("sq15", "sqrt"), ("sq127", F32), ("e4m3", "sq127")], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-30, 1e-38, 1e-40])
def test_native_follows_the_oracle_at_the_ends_of_the_range(
    kinds: tuple[Kind, Kind], size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny blocks, and a few gradients that are no numbers or overflow when squared: both near the exact step."""
    shape = (2, 1111)
    generator = torch.Generator().manual_seed(8)
    before, g = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) * size
    g[0, [5, 400, 800, 1100]] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38])
    ordinary = g.abs() < 1e30
    scalars = {**SCALARS, "eps": size * 1e-3 + 1e-42}
    low, high = first_step_bounds(before, g, scalars)
    moments = (1 - SCALARS["beta1"]) * g.double(), (1 - SCALARS["beta2"]) * g.double() ** 2
    for backend in ("torch", "native"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        p, states = before.clone(), [[zeros(shape, kind)] for kind in kinds]
        step(ADAMW, [p], [g], states, [codec_of(k) for k in kinds], scalars, seed=7)
        assert ((low <= p) & (p <= high))[ordinary].all()
        assert int(p.isnan().sum()) == 3
        for (state,), moment in zip(states, moments, strict=True):
            check_against_truth(state, moment, ordinary)
