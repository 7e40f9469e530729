"""Plays a step with a plan, operation by operation, independently of the solvers, and says what breaks."""

from memopt.planner.validation.simulating import simulate
from memopt.planner.validation.simulation import Simulation
from memopt.planner.validation.validating import Validation, validate

__all__ = ["Simulation", "Validation", "simulate", "validate"]
