"""Address planning: where every buffer lies, and how far that is from the best possible."""

from memopt.planner.placement.checking import find_fault
from memopt.planner.placement.csv_file import CsvError, read_csv, write_csv
from memopt.planner.placement.methods import all_methods
from memopt.planner.placement.methods.bilevel import two_levels
from memopt.planner.placement.placing import PlacementError, place
from memopt.planner.placement.problem import Buffer, Outcome, Placement, max_live

__all__ = [
    "Buffer",
    "CsvError",
    "Outcome",
    "Placement",
    "PlacementError",
    "all_methods",
    "find_fault",
    "max_live",
    "place",
    "read_csv",
    "two_levels",
    "write_csv",
]
