"""``plan`` and ``fit``: from a trace, a budget and a device to plans that have been validated."""

from memopt.planner.planning.deciding import plan
from memopt.planner.planning.fitting import Combination, Fit, cheapest, estimates, fit, largest_that_fits
from memopt.planner.planning.tiling import AUTOMATIC, plan_in_tiles

__all__ = [
    "AUTOMATIC",
    "Combination",
    "Fit",
    "cheapest",
    "estimates",
    "fit",
    "largest_that_fits",
    "plan",
    "plan_in_tiles",
]
