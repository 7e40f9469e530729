"""The policy problem: from a trace to what may happen to each saved storage, what that holds, and what it costs."""

from memopt.planner.problem.building import build
from memopt.planner.problem.inputs import movable_inputs
from memopt.planner.problem.replaying import is_steady, replays
from memopt.planner.problem.statement import BlockItems, Choice, Item, Problem, Resource

__all__ = ["BlockItems", "Choice", "Item", "Problem", "Resource", "build", "is_steady", "movable_inputs", "replays"]
