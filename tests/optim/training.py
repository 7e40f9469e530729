"""Runs of a few steps on fixed gradients, for the optimizer tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Shape = tuple[int, ...]

# Odd, ragged, short-rowed, convolutional, one-dimensional, small, 0-dimensional and empty.
SHAPES: tuple[Shape, ...] = ((64, 300), (97, 101), (32, 16, 3, 3), (5000,), (4, 2048), (8,), (3, 5), (), (0,), (0, 7))


def parameters(shapes: Sequence[Shape] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    """Normal values, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """Its parameters, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients(params: Sequence[Tensor], step: int, spread: float = 1.0) -> None:
    """Give every parameter the gradient of this step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * spread).to(param.dtype)


def run(optimizer: Optimizer, steps: int | Sequence[int]) -> None:
    """Steps with the gradients that belong to their numbers."""
    params = params_of(optimizer)
    for step in range(steps) if isinstance(steps, int) else steps:
        gradients(params, step)
        optimizer.step()


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process reads back, refusing anything but plain tensors and numbers."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest absolute difference over two lists of tensors."""
    pairs = zip(a, b, strict=True)
    return max(float((x.detach().double() - y.detach().double()).abs().max()) for x, y in pairs if x.numel())


def copies(params: Sequence[Tensor]) -> list[Tensor]:
    """Equal parameters that share nothing."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def state_tensors(optimizer: Optimizer) -> Iterator[tuple[int, str, Any]]:
    """(parameter, name, value) of everything an optimizer holds, in order."""
    for number, stored in optimizer.state_dict()["state"].items():
        for name in sorted(stored):
            yield number, name, stored[name]


def assert_same_state(a: Optimizer, b: Optimizer) -> None:
    """Both hold the same states, bit for bit."""
    left, right = list(state_tensors(a)), list(state_tensors(b))
    assert [entry[:2] for entry in left] == [entry[:2] for entry in right]
    for (number, name, x), (_, _, y) in zip(left, right, strict=True):
        same = torch.equal(x, y) if isinstance(x, Tensor) else x == y
        assert same, (number, name)


def assert_resumes_bitwise(build: Callable[[list[Tensor]], Optimizer], params: list[Tensor]) -> None:
    """Steps 0..5 in one go equal steps 0..2, a file, and steps 3..5 in a new optimizer."""
    whole, first = params, copies(params)
    one = build(whole)
    run(one, 6)
    before = build(first)
    run(before, 3)
    second = copies(first)
    after = build(second)
    after.load_state_dict(through_file(before.state_dict()))
    run(after, range(3, 6))
    for number, (x, y) in enumerate(zip(whole, second, strict=True)):
        assert torch.equal(x, y), f"parameter {number} differs after resuming"
    assert_same_state(one, after)
