"""``trace``: one training step of a model on fake tensors, as plain values."""

from memopt.planner.tracing.losses import TraceError
from memopt.planner.tracing.named_optimizers import check_name
from memopt.planner.tracing.step import trace

__all__ = ["TraceError", "check_name", "trace"]
