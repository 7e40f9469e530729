"""Reversible residual blocks, whose inputs are rebuilt from their outputs, as in RevNet and Reformer.

For each pair (f, g):   y1 = x1 + f(x2),  y2 = x2 + g(y1)    and back:    x2 = y2 - g(y1),  x1 = y1 - f(x2).

Saved for backward are the outputs of the last pair, whatever the depth, for one more evaluation of every f and g.
Addition and subtraction round, so a rebuilt input differs from the original by a few units in the last place of the
larger operand, and gradients with it: this is not bitwise the plain computation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from memopt.offload.ambient import (
    Autocast,
    Generators,
    autocast,
    autocast_state,
    default_generators,
    random_states,
    set_random_states,
)


class Reversible(nn.Module):
    """A stack of reversible pairs.

    Args:
        pairs: (f, g) of modules that map a tensor to one of the same shape; deterministic but for torch's random
            numbers, which are drawn again as in forward.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self._count = 0
        for self._count, (f, g) in enumerate(pairs, 1):
            self.add_module(f"f{self._count}", f)
            self.add_module(f"g{self._count}", g)
        if self._count == 0:
            raise ValueError("pairs is empty; a reversible stack needs at least one pair (f, g)")

    @property
    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(f, g) of every pair, in order."""
        return [(self.get_submodule(f"f{n}"), self.get_submodule(f"g{n}")) for n in range(1, self._count + 1)]

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams through every pair.

        Raises:
            ValueError: the streams differ in shape or dtype, or a module returns something else than its input's shape.
        """
        if x1.shape != x2.shape or x1.dtype != x2.dtype:
            one, other = f"{tuple(x1.shape)} {x1.dtype}", f"{tuple(x2.shape)} {x2.dtype}"
            raise ValueError(f"x1 is {one} and x2 is {other}; the two streams must be alike")
        if not torch.is_grad_enabled():
            y1, y2, _ = _forward(self, x1, x2)
            return y1, y2
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        y1, y2 = _Stack.apply(self, x1, x2, *parameters)  # type: ignore[no-untyped-call]
        return y1, y2


def _generators(x: Tensor) -> Generators:
    return default_generators({x.device})


def _forward(stack: Reversible, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, list[list[list[Tensor]]]]:
    states = []
    for f, g in stack.pairs:
        before_f = random_states(_generators(x1))
        x1 = x1 + _alike(f(x2), x1, f)
        before_g = random_states(_generators(x1))
        x2 = x2 + _alike(g(x1), x2, g)
        states.append([before_f, before_g])
    return x1, x2, states


def _alike(moved: Any, x: Tensor, module: nn.Module) -> Tensor:
    if not isinstance(moved, Tensor) or moved.shape != x.shape:
        found = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
        raise ValueError(
            f"{type(module).__name__} of a reversible pair returned {found} for an input of shape {tuple(x.shape)}; it "
            "must return one tensor of the same shape"
        )
    return moved


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Reversible, x1: Tensor, x2: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.stack, ctx.parameters = stack, parameters
        ctx.autocast = autocast_state(x1.device.type)
        y1, y2, ctx.states = _forward(stack, x1, x2)
        ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a Reversible stack cannot be differentiated twice (create_graph=True): it rebuilds its inputs without "
                "a graph; call its pairs yourself for such a step"
            )
        y1, y2 = ctx.saved_tensors
        gradients: dict[int, Tensor] = {}
        outside = random_states(_generators(y1))
        try:
            for (f, g), (before_f, before_g) in zip(reversed(ctx.stack.pairs), reversed(ctx.states), strict=True):
                moved, into = _half(g, y1, d2, before_g, ctx.autocast, gradients)
                y2, d1 = y2 - moved, d1 + into
                moved, into = _half(f, y2, d1, before_f, ctx.autocast, gradients)
                y1, d2 = y1 - moved, d2 + into
        finally:
            set_random_states(_generators(y1), outside)
        return None, d1, d2, *(gradients.get(id(parameter)) for parameter in ctx.parameters)


def _half(
    module: nn.Module, x: Tensor, d: Tensor, states: list[Tensor], cast: Autocast, gradients: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """One evaluation again: its value, and the gradient of its input; parameters' gradients are added up."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    set_random_states(_generators(x), states)
    with torch.enable_grad(), autocast(cast):
        x = x.detach().requires_grad_()
        y = module(x)
    into, *found = torch.autograd.grad(y, [x, *parameters], d.to(y.dtype), allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            before = gradients.get(id(parameter))
            gradients[id(parameter)] = gradient if before is None else before + gradient
    return y.detach(), torch.zeros_like(x) if into is None else into
