"""Symbolic operands: what an update rule or a codec computes, as a graph that the generators print.

An ``Expr`` node is either *uniform* (made of scalars only; Python evaluates it once per call in double precision) or
per element (float32). Nodes are interned in no table: a generator recognises a shared node by its identity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

Operand = Union[float, "Expr"]


@dataclass(frozen=True, eq=False)
class Expr:
    """One node: ``op`` over ``args``; ``name`` for inputs and tables, ``value`` for constants.

    Ops: ``input scalar const``; ``add sub mul div neg``; ``lt le gt ge eq ne``; ``and or not``; and the functions of
    :mod:`memopt.kernels.math`.
    """

    op: str
    args: tuple[Expr, ...] = ()
    name: str = ""
    value: float = 0.0
    uniform: bool = field(default=False)

    @property
    def boolean(self) -> bool:
        """Whether this is a comparison or a combination of comparisons."""
        return self.op in ("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not")

    def __add__(self, other: Operand) -> Expr:
        return make("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return make("add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return make("sub", self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return make("sub", other, self)

    def __mul__(self, other: Operand) -> Expr:
        return make("mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return make("mul", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return make("div", self, other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return make("div", other, self)

    def __neg__(self) -> Expr:
        return make("neg", self)

    def __lt__(self, other: Operand) -> Expr:
        return make("lt", self, other)

    def __le__(self, other: Operand) -> Expr:
        return make("le", self, other)

    def __gt__(self, other: Operand) -> Expr:
        return make("gt", self, other)

    def __ge__(self, other: Operand) -> Expr:
        return make("ge", self, other)

    def __and__(self, other: Expr) -> Expr:
        return make("and", self, other)

    def __or__(self, other: Expr) -> Expr:
        return make("or", self, other)

    def __invert__(self) -> Expr:
        return make("not", self)

    def __bool__(self) -> bool:
        raise TypeError("a rule is one expression for every element: use math.where instead of if, & instead of and")


def make(op: str, *args: Operand, name: str = "") -> Expr:
    """A node over operands; Python numbers become constants, and scalars alone give a uniform node."""
    nodes = tuple(constant(a) for a in args)
    return Expr(op, nodes, name, uniform=bool(nodes) and all(n.uniform for n in nodes))


def constant(value: Operand) -> Expr:
    """A number as a (uniform) node; nodes pass through."""
    if isinstance(value, Expr):
        return value
    return Expr("const", value=float(value), uniform=True)


def element(name: str) -> Expr:
    """A float32 input that differs by element."""
    return Expr("input", name=name)


def scalar(name: str) -> Expr:
    """A number the host computes once per step."""
    return Expr("scalar", name=name, uniform=True)
