"""A training before it begins: steps, and the learning rate where it turns."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.errors import ConfigError
from pipeline.student.data.order import TrainingOrder
from pipeline.student.training.optim import lr_factor
from schemas.config import TrainConfig, ViewsConfig


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """``rows_dropped`` of an epoch; ``lr`` is the learning rate by 0-based step, at the steps where it turns."""

    steps_per_epoch: int
    total_steps: int
    rows_dropped: int
    lr: dict[int, float]


def plan_training(train: TrainConfig, views: ViewsConfig, num_rows: int) -> TrainingPlan:
    """
    Args:
        views: what the teacher sees, since mixed rows come in pairs.
        num_rows: of one epoch.

    Raises:
        ConfigError: these rows make no such order, or the warm-up takes the whole training.
    """
    order = TrainingOrder.build(
        ["all"],
        [num_rows],
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        lanes=train.lanes,
        kind=train.order,
        tail=train.tail,
        plan=views,
    )
    total = train.epochs * order.num_steps
    if train.warmup_steps >= total:
        raise ConfigError("the warm-up takes the whole training", where="train.warmup_steps", got=f"of {total} steps")
    return TrainingPlan(
        steps_per_epoch=order.num_steps,
        total_steps=total,
        rows_dropped=order.rows_dropped,
        lr={step: _lr(train, step, order.num_steps) for step in _turns(train, order.num_steps)},
    )


def _turns(train: TrainConfig, steps_per_epoch: int) -> list[int]:
    """First step, end of warm-up, milestones, last step."""
    total = train.epochs * steps_per_epoch
    milestones = [epoch * steps_per_epoch for epoch in train.milestones]
    return sorted({0, train.warmup_steps, *(step for step in milestones if step < total), total - 1})


def _lr(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    total = train.epochs * steps_per_epoch
    return train.lr * lr_factor(step, train=train, total_steps=total)
