"""Tasks: what depends on the kind of target, one file a task. Metrics, losses and reports of a task stand in their own
layers, registered by its name; no other module tests which task it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def task_of(data: DataConfig | Mapping[str, Any]) -> Task:
    """The task of a config, or of the settings of an index, which name no task if it is that of format v1."""
    return _TASKS[data.task if isinstance(data, DataConfig) else data.get("task", Classification.name)]


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
