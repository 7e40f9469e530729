"""What is allocated when, by which operation and for what, while tensors run: meter and trace rest on it."""

from memopt.planner.tracking.categories import Profile, profile, settle
from memopt.planner.tracking.phases import PhaseWatcher
from memopt.planner.tracking.records import Record, register_scratch, tensors_in
from memopt.planner.tracking.restoring import restoring
from memopt.planner.tracking.tracker import StorageTracker

__all__ = [
    "PhaseWatcher",
    "Profile",
    "Record",
    "StorageTracker",
    "profile",
    "register_scratch",
    "restoring",
    "settle",
    "tensors_in",
]
