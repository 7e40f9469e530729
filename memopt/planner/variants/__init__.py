"""Steps derived from a traced one: changed in one respect, or only the last of its passes."""

from memopt.planner.variants.changes import (
    STATES,
    Change,
    change,
    chunked_loss,
    live_bytes,
    offload_state,
    one_block_at_a_time,
    release_gradients,
)
from memopt.planner.variants.passes import last_pass, pass_starts

__all__ = [
    "STATES",
    "Change",
    "change",
    "chunked_loss",
    "last_pass",
    "live_bytes",
    "offload_state",
    "one_block_at_a_time",
    "pass_starts",
    "release_gradients",
]
