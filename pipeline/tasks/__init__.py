"""Tasks: what depends on the kind of target, one file a task. Metrics, losses and reports of a task stand in their own
layers, registered by its name; no other module tests which task it is.
"""

from __future__ import annotations

from pipeline.tasks.classification import Classification
from pipeline.tasks.task import (
    BadTargetError,
    OutputSpec,
    Recount,
    StatisticsAccumulator,
    TargetColumn,
    Targets,
    Task,
    TeacherOutputs,
)
from schemas.config import DataConfig

_TASKS: dict[str, Task] = {task.name: task for task in (Classification(),)}


def task_of(data: DataConfig) -> Task:
    """The task that ``data.task`` names."""
    return _TASKS[data.task]


__all__ = [
    "BadTargetError",
    "OutputSpec",
    "Recount",
    "StatisticsAccumulator",
    "TargetColumn",
    "Targets",
    "Task",
    "TeacherOutputs",
    "task_of",
]
