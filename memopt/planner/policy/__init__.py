"""The policy as a mixed-integer program: variables, families of constraints, objective, solving."""

from memopt.planner.policy.solving import Solution, SolverError, smallest_peak, solve

__all__ = ["Solution", "SolverError", "smallest_peak", "solve"]
