"""The plan of a training: its steps, and its learning rate where the schedule changes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.student.data.order import order_of
from pipeline.student.training.optim import check_warmup, lr_factor
from schemas.config import TrainConfig, ViewsConfig


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """
    Attributes:
        rows_dropped: of each epoch.
        lr: the learning rate by 0-based step, at the steps where the schedule changes.
    """

    steps_per_epoch: int
    total_steps: int
    rows_dropped: int
    lr: dict[int, float]


def plan_training(
    train: TrainConfig, views: ViewsConfig, num_images: int, *, num_views: int | None = None
) -> TrainingPlan:
    """
    Args:
        views: of the teacher; mixed rows come in pairs.
        num_views: of each image, after which views repeat; None: they do not.

    Raises:
        ConfigError: as ``order_of`` and ``check_warmup``.
    """
    order = order_of(train, ["all"], [num_images], views, num_views=num_views)
    steps_per_epoch, total_steps = order.num_steps, train.epochs * order.num_steps
    check_warmup(train, total_steps)
    milestones = [epoch * steps_per_epoch for epoch in train.milestones if epoch < train.epochs]
    turns = sorted({0, train.warmup_steps, *milestones, total_steps - 1})
    lr = {step: train.lr * lr_factor(step, train=train, total_steps=total_steps) for step in turns}
    return TrainingPlan(steps_per_epoch, total_steps, order.rows_dropped, lr)
