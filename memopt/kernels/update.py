"""An element-wise optimizer rule, written once for every back end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from memopt.kernels.expr import element, scalar


@dataclass(frozen=True)
class State:
    """One state of a rule.

    Args:
        name: under which ``optimizer.state[p]`` holds it.
        signed: whether it takes negative values; tells which codecs fit.
    """

    name: str
    signed: bool = True


@dataclass(frozen=True)
class Update:
    """What one step does to an element.

    ``fn(p, g, states, s)`` gets the parameter, the gradient and a tuple of states (float32 values, whatever is
    stored) and the scalars by name. It returns ``(p, states)``, or ``(p, states, sums)`` when there are
    ``reductions``. It is written with :mod:`memopt.kernels.math`; an expression of scalars alone is computed by the
    host in double precision. Returning ``p`` or a state itself (the same object) leaves it unwritten.

    Args:
        name: letters, digits and ``_``; names the generated kernels.
        states: what the rule keeps between steps.
        scalars: names of the numbers the host computes each step. ``grad_scale``, where it is one of them, multiplies
            the gradient as it comes: native kernels leave out the product where it is 1, and round it as it stands
            elsewhere, so that powers of two change nothing else.
        reductions: names of the per-parameter sums ``fn`` returns, such as ``||p||**2``.
    """

    name: str
    states: tuple[State, ...]
    scalars: tuple[str, ...]
    fn: Callable[[Any, Any, tuple[Any, ...], SimpleNamespace], tuple[Any, ...]]
    reductions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"name must be letters, digits and '_', got {self.name!r}")

    def apply(self, p: Any, g: Any, states: tuple[Any, ...], s: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        """``fn`` with its answer completed to (p, states, sums) and counted."""
        answer = self.fn(p, g, states, s)
        new_p, new_states, sums = answer if self.reductions else (*answer, ())
        if len(new_states) != len(self.states) or len(sums) != len(self.reductions):
            raise ValueError(
                f"update {self.name!r} must return {len(self.states)} states and {len(self.reductions)} sums, "
                f"got {len(new_states)} and {len(sums)}"
            )
        return new_p, tuple(new_states), tuple(sums)

    def writes(self) -> tuple[bool, ...]:
        """For each state, and last for the parameter, whether a step changes it."""
        return _writes(self)


@functools.lru_cache(maxsize=256)
def _writes(update: Update) -> tuple[bool, ...]:
    p, states = element("p"), tuple(element(s.name) for s in update.states)
    scalars = SimpleNamespace(**{name: scalar(name) for name in update.scalars})
    new_p, new_states, _ = update.apply(p, element("g"), states, scalars)
    return (*(new is not old for new, old in zip(new_states, states, strict=True)), new_p is not p)
