"""Stochastic rounding: unbiased within derived bounds, and the same whatever the sharding and the threads."""

from __future__ import annotations

import math

import pytest
import torch

from memopt.kernels import codec_names, dequantize_blockwise, get_codec, hashing, quantize_blockwise
from tests.kernels.step_cases import most_undecided, neighbours_differ, requantized


@pytest.fixture(params=("torch", "native"))
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", request.param)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("name", codec_names())
def test_unbiased(name: str) -> None:
    """The mean of N roundings of x lies within 5 standard errors of x: estimates of roots add no bias.

    With neighbours w apart the variance is at most w**2 / 4, so a standard error is at most w / (2 sqrt(N)).
    """
    codec = get_codec(name)
    levels = codec.values().unique()
    levels = levels[(levels >= 0) & (levels <= 1)]
    for x in (0.9, 0.73, 0.31, 0.11, 0.017, 0.0021):
        above = int(torch.searchsorted(levels, torch.tensor(x)))
        if above == 0 or above == levels.numel():
            continue  # below the first value of a map without zero: rounds up to it
        width = (levels[above] - levels[above - 1]).item()
        for sign in (1.0, -1.0) if codec.signed and x < 0.7 else (1.0,):
            rows = torch.full((80, codec.block), sign * x)
            rows[:, 0] = 1.0
            drawn = dequantize_blockwise(quantize_blockwise(rows, name, rounding="stochastic", seed=3))[:, 1:]
            assert drawn.unique().numel() <= 2
            bound = 5 * width / (2 * math.sqrt(drawn.numel())) + 2e-6 * x
            assert abs(drawn.double().mean().item() - sign * x) <= bound


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("name", codec_names())
def test_rows_may_be_sharded(name: str) -> None:
    x = torch.randn(9, 700)
    options = {"rounding": "stochastic", "seed": 5, "step": 2, "number": 4}
    whole = requantized(x, name, offset=2**32 - 2000, **options)
    for first, last in ((0, 4), (4, 5), (5, 9)):
        part = requantized(x[first:last], name, offset=2**32 - 2000 + 700 * first, **options)
        assert torch.equal(part.codes, whole.codes[first:last])
        assert torch.equal(part.scales, whole.scales[first:last])


@pytest.mark.usefixtures("_backend")
def test_every_key_matters() -> None:
    x = torch.randn(4, 512)
    first = quantize_blockwise(x, "sq15", rounding="stochastic").codes
    for change in ({"seed": 1}, {"step": 1}, {"number": 1}, {"offset": 512}, {"offset": 2**32}):
        other = quantize_blockwise(x, "sq15", rounding="stochastic", **change).codes
        assert 0.2 < (other != first).float().mean() < 0.95
    assert torch.equal(quantize_blockwise(x, "sq15", rounding="stochastic").codes, first)


@pytest.mark.parametrize("name", codec_names())
def test_native_follows_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 1000)
    drawn = []
    for backend in ("torch", "native"):
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        drawn.append(requantized(x, name, rounding="stochastic", seed=1))
    assert torch.equal(drawn[0].scales, drawn[1].scales)
    assert neighbours_differ(*drawn) <= most_undecided(drawn[0])


def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_KERNELS", "native")
    x, codes = torch.randn(300, 1000), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            codes.append(quantize_blockwise(x, "sq127", rounding="stochastic").codes)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_noise_is_uniform_and_independent() -> None:
    """Chi-square of 64 bins below its mean 63 plus 6 standard deviations sqrt(126); correlations below 6 / sqrt(N)."""
    n = 1 << 16
    noise = {}
    for step in (0, 1):
        for slot in (0, 1, 2):
            base = hashing.base_key(11, step, 3)
            drawn = hashing.noise(base, 0, 1, n, slot, torch.device("cpu")).flatten().double()
            assert -0.5 <= drawn.min() < drawn.max() < 0.5
            for bits in (drawn * 64, drawn * 2**12):  # the upper six bits, and the six below them
                counts = torch.bincount(bits.floor().long() & 63, minlength=64).double()
                assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 6 * math.sqrt(126)
            noise[step, slot] = drawn * math.sqrt(12)
    keys = list(noise)
    for i, a in enumerate(keys):
        for lag in (1, 2, 16, 256, 512):
            assert abs((noise[a][lag:] * noise[a][:-lag]).mean()) < 6 / math.sqrt(n)
        for b in keys[i + 1 :]:
            assert abs((noise[a] * noise[b]).mean()) < 6 / math.sqrt(n)
