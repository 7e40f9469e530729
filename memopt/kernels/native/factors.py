"""What a step computes, after numbers have been moved between factors: one object for all that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from memopt.kernels.codecs import Codec
from memopt.kernels.expr import Expr, constant, element, scalar
from memopt.kernels.native.cpp import has_factors
from memopt.kernels.native.simplify import rewritten, scaled_uses, uniform_factor, units_of
from memopt.kernels.native.step_kind import GRAD_SCALE, StepKind


@dataclass(frozen=True)
class Computed:
    """Expressions of the inputs ``p``, ``g``, ``s0``, ``s1``, ... (``s0a`` times ``s0b`` where decoding gives factors).

    Args:
        param: the new parameter; None where it is not written.
        states: the new states by number, those that are written.
        sums: the reductions.
        uniforms: numbers that are needed beside those in the expressions.
        gains: for states that are decoded times a number, its place in ``uniforms``; it must not be negative.
        units: for new states that are still to be multiplied by a number, its place in ``uniforms``.
        positive: numbers that must be above 0.
    """

    param: Expr | None
    states: dict[int, Expr]
    sums: tuple[Expr, ...]
    uniforms: list[Expr]
    gains: dict[int, int]
    units: dict[int, int]
    positive: list[Expr]


def computed(kind: StepKind) -> Computed:
    """What a step of a kind computes.

    Where numbers may be moved (``kind.scaled``), a state is decoded times what the rule multiplies it by, and computed
    in units of what the rule multiplies all the rest by: only scales of blocks are multiplied.
    """
    count, update = len(kind.stored), kind.update
    inputs, p = tuple(element(f"s{j}") for j in range(count)), element("p")
    scalars = {name: scalar(name) for name in update.scalars}
    if GRAD_SCALE in scalars:  # an input: no factor to move elsewhere
        scalars[GRAD_SCALE] = element(GRAD_SCALE) if kind.graded else constant(1.0)
    new_p, states, sums = update.apply(p, element("g"), inputs, SimpleNamespace(**scalars))
    writes = [j for j in range(count) if states[j] is not inputs[j]]
    if not kind.scaled:
        return Computed(None if new_p is p else new_p, {j: states[j] for j in writes}, sums, [], {}, {}, [])
    made: dict[Expr, Expr] = {}
    roots = [rewritten(root, made) for root in (new_p, *states, *sums)]
    products = scaled_uses(roots, {inputs[j]: j for j in kind.quantised})
    units = units_of(roots, dict(enumerate(roots[1 : count + 1])), products)
    positive = [unit for unit, _ in units.values()]
    numbers = {j: uniform_factor(product) for j, product in products.items()}
    uniforms = [number / units[j][0] if j in units else number for j, number in numbers.items()] + positive
    made = {product: _decoded(kind, j) for j, product in products.items()}
    fresh = {j: rewritten(products[j] + rest, made, positive) for j, (_, rest) in units.items()}
    made |= {roots[j + 1]: fresh[j] * unit for j, (unit, _) in units.items()}
    new_p, *others = (rewritten(root, made, positive) for root in roots)
    return Computed(
        param=None if new_p is p else new_p,
        states={j: fresh.get(j, others[j]) for j in writes},
        sums=tuple(others[count:]),
        uniforms=uniforms,
        gains={j: at for at, j in enumerate(products)},
        units={j: len(products) + at for at, j in enumerate(units)},
        positive=positive,
    )


def _decoded(kind: StepKind, j: int) -> Expr:
    """A state decoded times a number: its factors where it has some, so that their product joins a sum."""
    codec = kind.stored[j]
    assert isinstance(codec, Codec)
    return element(f"s{j}a") * element(f"s{j}b") if codec.bits == 8 and has_factors(codec) else element(f"s{j}")
