"""The policy as a mixed-integer program: variables, families of constraints, objective, solving."""

from memopt.planner.policy.solvers import SolverError
from memopt.planner.policy.solving import Solution, smallest_peak, solve

__all__ = ["Solution", "SolverError", "smallest_peak", "solve"]
