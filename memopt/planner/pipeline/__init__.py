"""Peak activation memory and bubble of pipeline schedules."""

from memopt.planner.pipeline.schedules import ScheduleRow, schedule_table

__all__ = ["ScheduleRow", "schedule_table"]
