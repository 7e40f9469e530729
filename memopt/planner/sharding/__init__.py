"""What one device holds of a step that is spread over several: a trace in, a trace out."""

from memopt.planner.sharding.degrees import Degrees
from memopt.planner.sharding.dividing import shard

__all__ = ["Degrees", "shard"]
