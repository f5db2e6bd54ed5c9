"""Tasks: what depends on the kind of target, one file per task. Metrics, losses and reports of a task are in the
packages of metrics, losses and reports, registered by its name; no other module tests which task it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import ConfigError
from pipeline.tasks.classification import Classification
from pipeline.tasks.dense import Detection, Segmentation
from pipeline.tasks.domain_statistics import check_num_domains
from pipeline.tasks.domains import with_domain, without_domain
from pipeline.tasks.embedding import Embedding
from pipeline.tasks.heads import Heads
from pipeline.tasks.task import (
    AUX,
    DOMAIN,
    EMBEDDING,
    TOKENS,
    BadTargetError,
    HeadKind,
    MapWidth,
    OutputSpec,
    Recount,
    StatisticsAccumulator,
    TargetColumn,
    TargetMember,
    Targets,
    Task,
    TaskHead,
    TeacherOutputs,
    UndecodableTargetError,
    output_roles,
    planned_outputs,
)
from schemas.config import DataConfig

_DEFAULT = Classification.name
TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Heads, Embedding, Segmentation, Detection)}
"""By name."""


def task_of(data: DataConfig | Mapping[str, Any]) -> Task:
    """The task of a config, or of the settings of an index (``task_settings``).

    Raises:
        ValueError: this version does not have it, or its settings are not valid.
    """
    settings = dict(data)
    name = settings.get("task", _DEFAULT)
    if name not in TASKS:
        raise ValueError(f"the task is {name!r}, which this version does not have")
    task, domain = TASKS[name].of(settings), settings.get(DOMAIN)
    return task if domain is None else with_domain(task, domain)


def network_keys(data: DataConfig) -> tuple[str, ...]:
    """``Task.required_keys``, for commands that build networks.

    Raises:
        ConfigError: this version has no networks for the task.
    """
    task = task_of(data)
    if not task.has_networks:
        raise ConfigError(
            f"this version has no networks for task {task.name}",
            code="config.task-without-networks",
            where="data.task",
            got=task.name,
            expected=", ".join(name for name, kind in TASKS.items() if kind.has_networks),
            next_step="stillroom shards index reads and checks the masks or boxes of shards",
        )
    return task.required_keys


def task_settings(data: DataConfig) -> dict[str, Any]:
    """``Task.settings``, and the task's name where it is not classification: format v1 names none."""
    name = {} if data.task == _DEFAULT else {"task": data.task}
    return {**task_of(data).settings, **name}


__all__ = [
    "AUX",
    "DOMAIN",
    "EMBEDDING",
    "TASKS",
    "TOKENS",
    "BadTargetError",
    "HeadKind",
    "MapWidth",
    "OutputSpec",
    "Recount",
    "StatisticsAccumulator",
    "TargetColumn",
    "TargetMember",
    "Targets",
    "Task",
    "TaskHead",
    "TeacherOutputs",
    "UndecodableTargetError",
    "check_num_domains",
    "network_keys",
    "output_roles",
    "planned_outputs",
    "task_of",
    "task_settings",
    "without_domain",
]
