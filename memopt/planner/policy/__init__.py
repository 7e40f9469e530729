"""The policy as a mixed-integer program: variables, families of constraints, objective, search for integers."""

from memopt.planner.policy.solvers import SolverError
from memopt.planner.policy.solving import Relaxation, Solution, relax, smallest_peak, solve

__all__ = ["Relaxation", "Solution", "SolverError", "relax", "smallest_peak", "solve"]
