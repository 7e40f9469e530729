"""NaN, infinities, the largest, the smallest and no gradients at all through every rule and every state format."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.optim import RuleOptimizer, make
from memopt.optim.formats import names

ELEMENTWISE = ("adamw", "adam", "lion", "sgd", "rmsprop", "adagrad", "ademamix")
TOGETHER = ("lamb", "lars", "muon", "normuon", "adammini")  # norms, means or products over a parameter
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e38, 1e-40, 0.0)
SHAPES, WHERE, STEPS = ((256, 300), (3, 40)), (77, 211), 4  # the first takes rank-1 scales where a format has them


@functools.cache
def gradient(step: int, number: int) -> Tensor:
    """Normal values, but for the element at ``WHERE``: too small to be its block's maximum, whatever was before."""
    value = torch.randn(SHAPES[number], generator=torch.Generator().manual_seed(10 * step + number))
    if number == 0:
        value[WHERE] = 1e-3
    return value


def train(rule: str, state: str, special: float | None) -> tuple[list[Tensor], RuleOptimizer, bool]:
    """Parameters and optimizer after some steps, and whether the element at ``WHERE`` was finite after the second,
    in which ``special`` is its gradient."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(rule, params, lr=1e-3, state=state, **OPTIONS.get(rule, {}))
    finite = True
    for step in range(STEPS):
        for number, param in enumerate(params):
            param.grad = gradient(step, number).clone()
        if step == 1 and special is not None:
            params[0].grad[WHERE] = special
        optimizer.step()
        if step == 1:
            finite = bool(params[0][WHERE].isfinite())
    return [param.detach() for param in params], optimizer, finite


def stored(optimizer: RuleOptimizer, number: int) -> dict[str, Tensor]:
    """What is held for one parameter."""
    held = optimizer.state[optimizer.param_groups[0]["params"][number]]
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Where they differ; NaN equals NaN."""
    return (a != b) & ~((a != a) & (b != b))


@functools.cache
def as_fp32(rule: str, special: float) -> bool:
    """Whether fp32 leaves the element finite."""
    return train(rule, "fp32", special)[2]


@pytest.mark.parametrize("state", names())
@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_an_element_keeps_its_troubles_to_itself(rule: str, state: str) -> None:
    clean, twin, _ = train(rule, state, None)
    for special in SPECIAL:
        params, optimizer, finite = train(rule, state, special)
        assert finite == as_fp32(rule, special), special
        assert torch.equal(params[1], clean[1]), special
        if special == 1e38 and rule in ("lion", "sgd") and "bit" in state:
            continue  # a state that fp32 holds, and so the scale of its block
        moved = differing(params[0], clean[0])
        assert not moved.sum() - moved[WHERE].sum(), special
        for number in range(len(SHAPES)):
            ours, theirs = stored(optimizer, number), stored(twin, number)
            for name, value in ours.items():
                many = int(differing(value, theirs[name]).sum())
                assert many <= (number == 0 and not name.endswith(("_scales", "_maxima"))), (special, name, many)


@pytest.mark.parametrize("state", names())
@pytest.mark.parametrize("rule", TOGETHER)
def test_a_parameter_keeps_its_troubles_to_itself(rule: str, state: str) -> None:
    clean = train(rule, state, None)[0]
    for special in (torch.nan, 1e-40, 0.0):
        params = train(rule, state, special)[0]
        assert torch.equal(params[1], clean[1]), special
        if special == special:
            assert params[0].isfinite().all(), special
        else:
            assert params[0].isnan().any()


@pytest.mark.parametrize("state", names())
@pytest.mark.parametrize("rule", ELEMENTWISE + TOGETHER)
def test_no_gradient_moves_nothing(rule: str, state: str) -> None:
    params = [torch.nn.Parameter(torch.randn(3, 600)), torch.nn.Parameter(torch.zeros(2, 40))]
    before = [param.detach().clone() for param in params]
    optimizer = make(rule, params, state=state, lr=0.1, weight_decay=0.0, **OPTIONS.get(rule, {}))
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))
