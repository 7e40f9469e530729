"""bf16 and fp16 parameters: rounding to nearest loses small updates, the two options do not."""

from __future__ import annotations

import pytest
import torch

from memopt.kernels import step_torch
from memopt.optim import SGD, AdamW
from memopt.optim.kahan import rounded
from tests.optim.training import assert_resumes_bitwise, copies, parameters, run

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_is_the_conversion_to_the_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    largest = 30 if dtype == torch.bfloat16 else 15
    x = torch.randn(100_000, generator=generator) * 2.0 ** torch.randint(
        -30, largest - 2, (100_000,), generator=generator
    )
    special = torch.tensor([0.0, -0.0, 1.0, 1.00390625, 1.01171875, 2.0, torch.inf, -torch.inf])
    for values in (x, special):
        assert torch.equal(rounded(values, dtype), values.to(dtype).float())
    assert rounded(torch.tensor([torch.nan]), dtype).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x", [1.0, 1.001, -1.3, 3.14159e-3, 1e-7, -0.0, 60_001.0])
def test_the_oracles_stochastic_rounding_is_unbiased(dtype: torch.dtype, x: float) -> None:
    """Over all 2**16 random numbers: one of the two neighbours, and on average the value, to the weight of a number."""
    value = torch.full((2**16,), x)
    found = step_torch.rounded(value, dtype, torch.arange(2**16)).double()
    low, high, exact = found.min(), found.max(), value[0].double()
    if value[0].to(dtype) == value[0]:
        assert low == high == exact
        return
    assert low < exact < high
    assert torch.equal(low.to(dtype), torch.nextafter(high.to(dtype), torch.tensor(-torch.inf, dtype=dtype)))
    assert ((found == low) | (found == high)).all()
    assert (found.mean() - exact).abs() <= 2.0**-16 * (high - low)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(97, 101), (8,), (64, 300)])
def test_updates_far_below_the_spacing_add_up(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """100 steps of 1e-5 down from 1: 1e-3 in all, and bf16's spacing there is 4e-3 (fp16's 5e-4)."""
    found = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        param = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        param.grad = torch.ones_like(param)
        optimizer = SGD([param], lr=1e-5, param_rounding=rounding)
        for _ in range(100):
            optimizer.step()
        found[rounding] = param.detach().double() - 1
        if rounding == "kahan":
            found["kahan"] = found["kahan"] + optimizer.state[param]["compensation"].double()
    assert float(found["nearest"].abs().max()) == 0
    # The compensation's own spacing near 1e-3 is 2**-10 times the type's: in 100 steps of stochastic rounding a
    # deviation of at most 10 half spacings; five of these for the largest element, fewer for the mean.
    width = 10 * 2.0**-10 * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11)
    assert float((found["kahan"] + 1e-3).abs().max()) < 5 * width
    assert abs(float(found["kahan"].mean()) + 1e-3) < 5 * width / param.numel() ** 0.5 + 100 * 2.0**-25  # and fp32 at 1
    # The mean of n elements, each spacing times a Bernoulli sum: its deviation is below sqrt(1e-3 spacing / n).
    spacing = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    deviation = (1e-3 * spacing / param.numel()) ** 0.5
    assert abs(float(found["stochastic"].mean()) + 1e-3) < 5 * deviation + 1e-5


@pytest.mark.parametrize("state", ["fp32", "8bit", "4bit"])
def test_kahan_follows_fp32_parameters_and_resumes(state: str) -> None:
    shapes = [(64, 300), (97, 101), (8,)]
    wide = [torch.nn.Parameter(p.detach().float()) for p in parameters(shapes, torch.bfloat16)]
    narrow = [torch.nn.Parameter(p.detach().bfloat16()) for p in wide]
    plain = copies(narrow)
    kept = AdamW(narrow, lr=1e-4, state="fp32", param_rounding="kahan")
    run(kept, 20)
    run(AdamW(plain, lr=1e-4, state="fp32"), 20)
    run(AdamW(wide, lr=1e-4, state="fp32"), 20)
    distances = []
    for params, optimizer in ((narrow, kept), (plain, None)):
        total = 0.0
        for p, q in zip(params, wide, strict=True):
            value = p.detach().float()
            if optimizer is not None:
                value = value + optimizer.state[p]["compensation"].float()
            total += float((value - q.detach()).abs().sum())
        distances.append(total)
    assert distances[0] < 0.05 * distances[1]
    assert_resumes_bitwise(
        lambda params: AdamW(params, state=state, param_rounding="kahan"), parameters(shapes, torch.bfloat16)
    )


def test_kahan_costs_two_bytes_and_nothing_for_fp32() -> None:
    for dtype, extra in ((torch.bfloat16, 2), (torch.float32, 0)):
        params = parameters([(64, 300)], dtype)
        one, other = AdamW(params, param_rounding="kahan"), AdamW(copies(params))
        run(one, 1)
        run(other, 1)
        assert one.state_bytes() - other.state_bytes() == extra * 64 * 300
