"""The mixed-integer program under construction, and the families of constraints that fill it.

Letters: x_c is 1 when choice c is taken, y_r is 1 when resource r is. Bytes are counted in units of ``unit_bytes`` and
seconds in shares of the step, so that all coefficients lie within a few powers of ten of 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from memopt.planner.problem import BlockItems, Choice, Problem, Resource


@dataclass
class Program:
    """A PuLP problem with its variables by number; ``peak`` is the limit on memory, in units, where it is sought."""

    problem: Problem
    model: Any
    unit_bytes: float
    unit_seconds: float
    choices: dict[int, Any] = field(default_factory=dict)
    resources: dict[int, Any] = field(default_factory=dict)
    peak: Any = None
    stalls: list[Any] = field(default_factory=list)

    def add(self, constraint: Any) -> None:
        """Adds one constraint."""
        self.model.addConstraint(constraint)

    def continuous(self, name: str, low: float | None = 0.0, high: float | None = None) -> Any:
        """A new continuous variable."""
        if hasattr(self.model, "add_variable"):
            return self.model.add_variable(name, low, high)
        import pulp  # before 3.3 variables were made on their own

        return pulp.LpVariable(name, low, high)

    def total(self, terms: Iterable[tuple[Any, float]], constant: float = 0.0) -> Any:
        """The sum of coefficient x variable."""
        import pulp

        return pulp.LpAffineExpression(list(terms), constant)

    def value(self, variable: int) -> Any:
        """The program's variable behind a number of the problem."""
        return self.choices[variable] if variable in self.choices else self.resources[variable]

    def all_choices(self) -> Iterable[Choice]:
        """Every choice of every item."""
        return (choice for block in self.problem.blocks for item in block.items for choice in item.choices)

    def all_resources(self) -> Iterable[Resource]:
        """Every resource of every block."""
        return (resource for block in self.problem.blocks for resource in block.resources)

    def extra_seconds(self, block: BlockItems) -> list[tuple[Any, float]]:
        """What a block's choices and resources add to the step, as (variable, share of the step)."""
        unit = self.unit_seconds
        terms = [(self.choices[c.variable], c.seconds / unit) for i in block.items for c in i.choices if c.seconds]
        return terms + [(self.resources[r.variable], r.seconds / unit) for r in block.resources if r.seconds]
