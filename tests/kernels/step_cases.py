"""What the tests of quantisers and of the fused step share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import Codec, Quantized, State, Update, dequantize_blockwise, get_codec, quantize_blockwise, step
from memopt.kernels import math as km

ROUNDING = 2.0**-24  # of float32, relative
SMALLEST = 3e-45  # two units of the smallest float32
SCALARS = {"lr": 1e-2, "lr_hat": 1.3e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decay": 0.05}


def _adamw(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    m = s.beta1 * states[0] + (1 - s.beta1) * g
    v = s.beta2 * states[1] + (1 - s.beta2) * g * g
    return p * (1 - s.lr * s.decay) - s.lr_hat * m / (km.sqrt(v) + s.eps), (m, v)


def _summing(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    m = s.beta1 * states[0] + (1 - s.beta1) * g
    return p, (m,), (p * p, km.abs(m))


def _everything(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
    x = km.clamp(km.exp(km.minimum(g, 2.0)) + km.log(km.abs(p) + 1.0) - km.floor(3.0 * p), -50.0, 50.0)
    y = km.where((p > 0.0) & ~(g < 0.1) | (p >= 2.0), km.rsqrt(km.abs(g) + s.eps), km.sign(g) * km.copysign(p, -g))
    z = (
        km.fma(x, 0.5, km.maximum(y, -3.0))
        + km.root4(km.abs(p))
        + km.take((1.0, 2.0, 4.0), km.where(g <= 0.0, 2.0, 0.0))
    )
    return z - km.where(km.abs(p) != 0.25, km.sqrt(s.lr) / 2, -p), (states[0],)


ADAMW = Update("adamw", (State("m"), State("v", signed=False)), tuple(SCALARS), _adamw)
SUMMING = Update("summing", (State("m"),), ("beta1",), _summing, reductions=("squares", "moments"))
SIGN = Update("signs", (State("unused"),), (), lambda p, g, states, s: (km.sign(g), states))
EVERYTHING = Update("everything", (State("unused"),), ("lr", "eps"), _everything)
ODD_SHAPES = [(5, 300), (7,), (0,), (), (3, 700), (2, 3, 5), (1000,), (4, 0), (33, 256), (3, 1023), (257,), (2, 511)]

Kind = str | torch.dtype  # a codec's name, or the dtype of a plain state


def zeros(shape: Sequence[int], kind: Kind) -> Tensor | Quantized:
    """A state of zeros."""
    return Quantized.zeros(tuple(shape), kind) if isinstance(kind, str) else torch.zeros(shape, dtype=kind)


def codec_of(kind: Kind) -> Codec | None:
    """What ``step`` wants for such a state."""
    return get_codec(kind) if isinstance(kind, str) else None


def value(state: Tensor | Quantized) -> Tensor:
    """A state as float32."""
    return dequantize_blockwise(state) if isinstance(state, Quantized) else state.float()


def run_adamw(
    shapes: Sequence[Sequence[int]],
    kinds: Sequence[Kind],
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    steps: int = 3,
    **options: Any,
) -> tuple[list[Tensor], list[list[Tensor | Quantized]]]:
    """Parameters and states after some steps on fixed random gradients."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    states = [[zeros(shape, kind) for shape in shapes] for kind in kinds]
    for number in range(steps):
        grads = [torch.randn(shape, generator=generator).to(grad_dtype or dtype) for shape in shapes]
        step(ADAMW, params, grads, states, [codec_of(k) for k in kinds], SCALARS, seed=7, step=number, **options)
    return params, states


def data_families(shape: Sequence[int], signed: bool) -> dict[str, Tensor]:
    """Normal, heavy-tailed, subnormal, constant, zero and mixed data."""
    normal = torch.randn(shape)
    families = {
        "normal": normal,
        "heavy": normal / torch.rand(shape).pow(3).clamp_min(1e-9),
        "small": normal * 1e-30,
        "subnormal": normal * 1e-39,
        "constant": torch.full(shape, -0.37),
        "zero": torch.zeros(shape),
        "spread": normal * torch.logspace(-38, 30, normal.numel()).reshape(shape),
    }
    return families if signed else {name: x.abs() for name, x in families.items()}


def brute_force_excess(x: Tensor, q: Quantized) -> Tensor:
    """How much further each decoded value is than the nearest one, in float64, beyond rounding of the arithmetic.

    A value that is the fourth power of a thrice rounded root and of two products is off by at most 4 * 3 + 2 roundings
    of 2**-24, and x / scale by 2; subnormal values by two units of the smallest.
    """
    codec = q.codec
    levels = codec.values().double()
    if codec.name == "dynamic8u":  # a value above zero never takes the code of zero
        levels = levels.clone()
        levels[0] = levels[1]
    if codec.name == "e4m3":
        levels = levels[levels.abs() <= 1]
    index = codec.blocks(x.shape).index()
    scales = q.scales.reshape(-1, q.scales.shape[-1])[:, index].double()
    wanted = x.double().reshape(scales.shape)
    best = torch.stack([(wanted - level * scales).abs() for level in levels.unique()]).amin(0)
    best = torch.where(wanted == 0, torch.minimum(best, wanted.abs()), best)
    if codec.name != "dynamic8u":
        best = torch.where(wanted == 0, (levels.abs().amin() * scales), best)
    decoded = dequantize_blockwise(q).double().reshape(scales.shape)
    return (decoded - wanted).abs() - best - 16 * 2.0**-24 * torch.maximum(wanted.abs(), decoded.abs()) - 3e-45


def neighbours_differ(a: Quantized, b: Quantized) -> float:
    """The share of elements whose codes differ, after checking that they differ by neighbouring values only."""
    if not value(a).numel():
        return 0.0
    levels = a.codec.values().double().unique()
    between = (levels[1:] + levels[:-1]) / 2
    places = []
    for q in (a, b):
        scale = q.scales.reshape(-1, q.scales.shape[-1])[:, q.codec.blocks(q.shape).index()].reshape(q.shape).double()
        places.append(torch.bucketize(torch.where(scale > 0, value(q) / scale, 0.0), between))
    steps = (places[0] - places[1]).abs()
    assert steps.max() <= 1
    return (steps > 0).double().mean().item()


def most_undecided(q: Quantized, roundings: int = 4) -> float:
    """The largest share of codes in which two correct implementations may differ.

    Both know a value only to some roundings of 2**-24 of its scale, so that one that lies twice as near to a boundary
    between two of n levels may go either way: of values spread over the levels a share of 4 * roundings * 2**-24 * n.
    Their count is Poisson's; four of its standard deviations and a single one more are granted.
    """
    count = q.codes.numel() * 8 // q.codec.bits
    expected = 4 * roundings * ROUNDING * 2**q.codec.bits * count
    return (expected + 4 * math.sqrt(expected) + 1) / max(1, count)


def check_parameters(ours: Tensor, oracle: Tensor, before: Tensor) -> None:
    """Two implementations of a step of ``ADAMW`` whose moments agree, element by element.

    Each rounds the new parameter three times (the factor of decay, the product with it, the difference) and its change
    eight times (two products and two roots in it, eps, the quotient, lr); below 32 bits the two may land on neighbours.
    """
    wide, start = oracle.double(), before.double()
    bound = ROUNDING * (6 * wide.abs() + 16 * (wide - start).abs()) + SMALLEST
    if oracle.dtype != torch.float32:
        bound += torch.finfo(oracle.dtype).eps * wide.abs() + torch.finfo(oracle.dtype).smallest_normal
    both_nan = ours.isnan() & oracle.isnan()
    assert (((ours.double() - wide).abs() <= bound) | both_nan).all()


def check_state(ours: Tensor | Quantized, oracle: Tensor | Quantized, roundings: int = 4) -> None:
    """A moment after the same step of two implementations, each within some roundings of the exact one.

    Two of them make the first moment out of a gradient, three the second; the scale is a moment, the codes neighbours.
    """
    if isinstance(oracle, Quantized) and isinstance(ours, Quantized):
        torch.testing.assert_close(ours.scales, oracle.scales, rtol=2 * roundings * ROUNDING, atol=SMALLEST)
        assert neighbours_differ(oracle, ours) <= most_undecided(oracle, roundings)
    else:
        assert isinstance(oracle, Tensor)
        assert isinstance(ours, Tensor)
        info = torch.finfo(oracle.dtype)
        one_place = 0.0 if oracle.dtype == torch.float32 else info.eps
        least = max(SMALLEST, info.eps * info.smallest_normal)
        rtol = one_place + 2 * roundings * ROUNDING
        torch.testing.assert_close(ours, oracle, rtol=rtol, atol=least, equal_nan=True)


def first_step_bounds(p: Tensor, g: Tensor, s: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Between which numbers a first step of ``ADAMW`` leaves the parameters, float64, whatever it rounds on the way.

    Products, moments and eps are each off by some roundings, or by units of the smallest number where they are tiny.
    """
    moment, root = (1 - s["beta1"]) * g.double().abs(), (1 - s["beta2"]) * g.double() ** 2
    share = 16 * ROUNDING
    above = s["lr_hat"] * (moment + SMALLEST) * (1 + share) + SMALLEST
    below = (s["lr_hat"] * (moment - SMALLEST) * (1 - share) - SMALLEST).clamp(min=0)
    most = ((root + SMALLEST).sqrt() + s["eps"]) * (1 + share) + SMALLEST
    least = (((root - SMALLEST).clamp(min=0).sqrt() + s["eps"]) * (1 - share) - SMALLEST).clamp(min=0)
    kept, sign = p.double() * (1 - s["lr"] * s["decay"]), g.double().sign()
    ends = torch.stack([kept - sign * below / most, kept - sign * above / least])
    slack = 6 * ROUNDING * (kept.abs() + ends.abs().amax(0)) + SMALLEST
    return ends.amin(0) - slack, ends.amax(0) + slack


def check_against_truth(state: Tensor | Quantized, truth: Tensor, where: Tensor) -> None:
    """A moment is some roundings and units of the smallest number off, or one of the two codes beside such a one, which
    decodes with up to 14 roundings (see ``brute_force_excess``); scales are the largest moments of their blocks."""
    low, high = (truth.abs() * (1 - 8 * ROUNDING) - SMALLEST).clamp(min=0), truth.abs() * (1 + 8 * ROUNDING) + SMALLEST
    found = value(state).abs()
    if isinstance(state, Quantized):
        assert state.scales.isfinite().all()
        index = state.codec.blocks(state.shape).index()
        held = state.scales.reshape(-1, state.scales.shape[-1]).double()
        rows, inside = truth.abs().reshape(len(held), -1), where.reshape(len(held), -1)
        for k in range(held.shape[1]):
            largest, ordinary = rows[:, index == k].amax(1), inside[:, index == k].all(1)
            assert ((held[:, k] - largest).abs() <= 8 * ROUNDING * largest + SMALLEST)[ordinary].all()
        scale = held[:, index].reshape(state.shape)
        levels = state.codec.values().double().abs().unique()
        least, most = scale * (1 - 8 * ROUNDING) - SMALLEST, scale * (1 + 8 * ROUNDING) + SMALLEST
        below = torch.searchsorted(levels, torch.where(most > 0, low / most, 0.0), right=True) - 1
        above = torch.searchsorted(levels, torch.where(least > 0, high / least, torch.inf))
        decoded = levels[below.clamp(min=0)] * scale, levels[above.clamp(max=len(levels) - 1)] * scale
        low, high = decoded[0] * (1 - 16 * ROUNDING) - SMALLEST, decoded[1] * (1 + 16 * ROUNDING) + SMALLEST
    assert ((low <= found) & (found <= high))[where].all()
    assert (value(state) * truth.sign() >= 0)[where].all()


def check_slow_decay() -> None:
    """A second moment that loses a ten-thousandth a step does so in the mean, within five standard deviations: rounding
    goes a code down with the probability that takes. An estimated root must not stand in for the exact one there."""
    rule = Update(
        "decay", (State("v", signed=False),), ("b",), lambda p, g, s, k: (p, (k.b * s[0] + (1 - k.b) * g * g,))
    )
    b, rows = 0.9999, 2048
    for name, chosen in (("sqrt", (3, 8, 12, 15)), ("root4", (20, 100, 250))):
        codec = get_codec(name)
        levels = codec.values().double()
        for k in chosen:
            x = torch.full((rows, codec.block), float(levels[k]))
            x[:, 0] = 1.0
            state = quantize_blockwise(x, codec)
            grads = torch.zeros_like(x)
            grads[:, 0] = 1.0  # the block's largest stays
            step(rule, [torch.zeros_like(x)], [grads], [[state]], [state.codec], {"b": b}, seed=k)
            down, count = (1 - b) * levels[k] / (levels[k] - levels[k - 1]), rows * (codec.block - 1)
            found = (value(state)[:, 1:] < float(levels[k]) * (1 - 1e-3)).double().mean()
            assert abs(found - down) <= 5 * (down / count) ** 0.5, (name, k, found, down)


def requantized(x: Tensor, name: str, **options: Any) -> Quantized:
    """``quantize_blockwise``, of magnitudes where the codec is unsigned."""
    return quantize_blockwise(x if get_codec(name).signed else x.abs(), name, **options)
