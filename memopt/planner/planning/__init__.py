"""``plan`` and ``fit``: from a trace, a budget and a device to plans that have been validated."""

from memopt.planner.planning.deciding import plan
from memopt.planner.planning.fitting import Combination, Fit, cheapest, estimates, fit, largest_that_fits

__all__ = ["Combination", "Fit", "cheapest", "estimates", "fit", "largest_that_fits", "plan"]
