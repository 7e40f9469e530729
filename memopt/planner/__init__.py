"""From a model to a plan: trace -> problem -> policy -> placement -> validation -> plan, a folder a stage."""

from memopt.planner.devices import Hardware, HardwareError, hardware, hardware_names, probe
from memopt.planner.models import FoundModel, ModelError, find_model, preset_names
from memopt.planner.pipeline import ScheduleRow, schedule_table
from memopt.planner.placement import Buffer, Placement, place
from memopt.planner.plan_file import Plan, Timeline
from memopt.planner.planning import Combination, Fit, fit, largest_that_fits, plan, plan_in_tiles
from memopt.planner.policy import SolverError
from memopt.planner.sharding import Degrees, shard
from memopt.planner.signature import block_signature, describe
from memopt.planner.tracing import TraceError, trace
from memopt.planner.units import BudgetError, format_bytes, parse_bytes
from memopt.planner.validation import Validation, validate
from memopt.planner.values import (
    Action,
    Block,
    BlockPlan,
    Category,
    Op,
    Phase,
    SavedStorage,
    Status,
    Storage,
    StorageAction,
    Tile,
    Trace,
)

__all__ = [
    "Action",
    "Block",
    "BlockPlan",
    "BudgetError",
    "Buffer",
    "Category",
    "Combination",
    "Degrees",
    "Fit",
    "FoundModel",
    "Hardware",
    "HardwareError",
    "ModelError",
    "Op",
    "Phase",
    "Placement",
    "Plan",
    "SavedStorage",
    "ScheduleRow",
    "SolverError",
    "Status",
    "Storage",
    "StorageAction",
    "Tile",
    "Timeline",
    "Trace",
    "TraceError",
    "Validation",
    "block_signature",
    "describe",
    "find_model",
    "fit",
    "format_bytes",
    "hardware",
    "hardware_names",
    "largest_that_fits",
    "parse_bytes",
    "place",
    "plan",
    "plan_in_tiles",
    "preset_names",
    "probe",
    "schedule_table",
    "shard",
    "trace",
    "validate",
]
