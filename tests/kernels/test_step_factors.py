"""Native steps move numbers between factors: a state's into its scale, a gradient's into its moment's unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memopt.kernels import State, Update, quantize_blockwise, step
from memopt.kernels import math as km
from tests.kernels.step_cases import ADAMW, ROUNDING, SCALARS, Kind, check_state, codec_of, value, zeros


def test_states_and_gradients_may_be_multiplied_by_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels decode a state times its factor, through roots, and divide by the other term's, where they can."""

    def fn(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
        return p, (s.beta * states[0] + 0.5 * (g * s.scale), s.square * (g * s.scale * g) + s.keep * states[1])

    rule = Update("negative", (State("m"), State("v", signed=False)), ("beta", "keep", "scale", "square"), fn)
    g = torch.randn(3, 512)
    first, second = torch.randn(3, 512), torch.rand(3, 512)
    for beta, keep, scale, kinds in (
        (0.9, 0.5, 0.1, ("sq127", "root4")),
        (-0.9, 0.5, 0.1, ("sq127", "root4")),
        (-0.9, 0.0, 0.1, ("sq15", "sqrt")),
        (0.9, 0.5, 0.0, ("sq127", "root4")),
        (0.9, 0.5, -0.1, ("sq127", "sq127")),
    ):
        outcomes = []
        for backend in ("torch", "native"):
            monkeypatch.setenv("MEMOPT_KERNELS", "torch")
            states = [[quantize_blockwise(x, kind)] for x, kind in zip((first, second), kinds, strict=True)]
            monkeypatch.setenv("MEMOPT_KERNELS", backend)
            scalars = {"beta": beta, "keep": keep, "scale": scale, "square": 0.5}
            step(rule, [torch.zeros(3, 512)], [g], states, [codec_of(k) for k in kinds], scalars)
            outcomes.append(states)
        for (a,), (b,) in zip(*outcomes, strict=True):
            check_state(b, a, roundings=20)  # fourteen in a decoded value, two products a term, a sum


def belief(p: Any, g: Any, m: Any, v: Any, s: Any) -> tuple[Any, ...]:
    m = s.b * m + s.c * g
    return p, m, s.b * v + s.c * ((g - m) * (g - m))


def decayed(p: Any, g: Any, m: Any, v: Any, s: Any) -> tuple[Any, ...]:
    m = s.b * m
    return p - m, m + s.c * g, v


def rest(p: Any, g: Any, m: Any, v: Any, s: Any) -> tuple[Any, ...]:
    m, v = s.b * m, s.b * v
    return p, m + s.c * km.abs(m), v + s.c * km.sqrt(v)


MIXED: dict[str, Any] = {
    "belief": belief,
    "decayed": decayed,
    "rest": rest,
    "products": lambda p, g, m, v, s: (p, s.b * m + s.c * v, v),
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("kinds", [("sq127", "root4"), ("sq15", "sqrt"), ("e4m3", "e4m3")], ids=str)
def test_native_follows_the_oracle_where_states_use_each_other(
    case: str, kinds: tuple[Kind, Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is moved between factors must be all of it, wherever else a product or a state is used."""

    def fn(p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...]]:
        new_p, *news = MIXED[case](p, g, *states, s)
        return new_p, tuple(news)

    rule = Update("mixed", (State("m"), State("v", signed=False)), ("b", "c"), fn)
    outcomes = []
    for backend in ("torch", "native"):
        generator = torch.Generator().manual_seed(5)
        p, g, m = (torch.randn(3, 600, generator=generator) for _ in range(3))
        v = torch.rand(3, 600, generator=generator)
        monkeypatch.setenv("MEMOPT_KERNELS", "torch")
        states = [[quantize_blockwise(x, kind)] for x, kind in zip((m, v), kinds, strict=True)]
        monkeypatch.setenv("MEMOPT_KERNELS", backend)
        step(rule, [p], [g], states, [codec_of(k) for k in kinds], {"b": 0.7, "c": 0.2})
        outcomes.append((p, states))
    (p, states), (ours, our_states) = outcomes
    torch.testing.assert_close(ours, p, rtol=20 * ROUNDING, atol=20 * ROUNDING)
    for (a,), (b,) in zip(states, our_states, strict=True):
        check_state(b, a, roundings=20)


@pytest.mark.parametrize(("size", "g"), [(1e-25, 1e30), (1e25, 1e-30)])
def test_numbers_keep_their_order_where_their_product_is_no_float(size: float, g: float) -> None:
    rule = Update("far", (State("m"),), ("a", "b"), lambda p, g, states, s: (p - s.a * (s.b * g), states))
    p = torch.zeros(300)
    step(rule, [p], [torch.full((300,), g)], [[torch.zeros(300)]], [None], {"a": size, "b": size})
    torch.testing.assert_close(p.double(), torch.full((300,), -size * size * g, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("_backend")
def test_a_learning_rate_of_zero_moves_no_parameter() -> None:
    p, g = torch.randn(3, 700), torch.randn(3, 700)
    g[1] = 0.0
    before, states = p.clone(), [[zeros((3, 700), "sq127")], [zeros((3, 700), "root4")]]
    for number in range(2):
        step(ADAMW, [p], [g], states, ["sq127", "root4"], {**SCALARS, "lr_hat": 0.0, "decay": 0.0}, step=number)
    assert torch.equal(p, before)
    assert value(states[0][0])[0].any()
