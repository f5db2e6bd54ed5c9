"""A training planned from a number of images: steps and rates by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.student.training.schedule import plan_training
from schemas.config import TrainConfig, ViewsConfig
from tests.errors import raises

CROPS = ViewsConfig(kind="crop")


def train(**keys: Any) -> TrainConfig:
    return TrainConfig.model_validate(keys)


def test_steps_and_rates_of_a_step_schedule() -> None:
    plan = plan_training(
        train(epochs=240, global_batch_size=128, lr=0.1, schedule="step", milestones=[150, 180, 210], gamma=0.1),
        CROPS,
        50_000,
    )
    assert (plan.steps_per_epoch, plan.total_steps, plan.rows_dropped) == (390, 93_600, 80)
    assert list(plan.lr) == [0, 58_500, 70_200, 81_900, 93_599]
    assert list(plan.lr.values()) == pytest.approx([0.1, 0.01, 0.001, 1e-4, 1e-4])


def test_steps_and_rates_of_a_cosine_with_warm_up() -> None:
    plan = plan_training(train(epochs=4, global_batch_size=100, lr=1.0, warmup_steps=10, tail="short"), CROPS, 950)
    assert (plan.steps_per_epoch, plan.total_steps, plan.rows_dropped) == (10, 40, 0)
    assert list(plan.lr) == [0, 10, 39]
    # One thirtieth of the half wave is left at the last step.
    assert list(plan.lr.values()) == pytest.approx([0.1, 1.0, 0.0027390523])


def test_an_epoch_of_several_views_of_each_image_has_as_many_times_the_steps() -> None:
    keys = {"epochs": 6, "global_batch_size": 128, "lr": 0.1, "schedule": "step", "milestones": [3], "tail": "short"}
    plan = plan_training(train(views_per_image=4, **keys), CROPS, 1000, num_views=10)
    assert (plan.steps_per_epoch, plan.total_steps, list(plan.lr)) == (32, 192, [0, 96, 191])
    with raises("train.too-few-views"):
        plan_training(train(views_per_image=4, **keys), CROPS, 1000, num_views=3)


def test_what_a_training_would_be_refused_for_is_refused() -> None:
    with raises("train.too-many-dropped"):
        plan_training(train(global_batch_size=512), CROPS, 1020)
    with raises("train.warmup-too-long"):
        plan_training(train(global_batch_size=10, warmup_steps=10), CROPS, 100)
    with raises("train.odd-batch-size"):
        plan_training(train(global_batch_size=33), ViewsConfig(kind="function_matching"), 99)
