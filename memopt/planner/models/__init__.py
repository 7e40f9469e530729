"""Models by name: presets, transformers configurations, and reference models of plain torch."""

from memopt.planner.models.finding import FoundModel, ModelError, find_model, is_function, preset_names

__all__ = ["FoundModel", "ModelError", "find_model", "is_function", "preset_names"]
