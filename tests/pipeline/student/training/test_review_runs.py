"""Training by feature maps: it learns from teachers of other families, resumes bitwise, and ranks equal one process."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models import load_model
from pipeline.student.data.loader import load_batches
from pipeline.student.distributed import DistributedContext
from pipeline.student.run import checkpoint
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import (
    CE,
    NORMALISED,
    SMALL,
    assert_weights_close,
    check_resume,
    index_shards,
    losses,
    metrics,
    run,
    run_config,
    state_of,
    trainer_of,
    training_error,
)
from tests.ranks import group, run_two_ranks
from tests.tolerances import magnitude_of, network_operations, reordered, ulps

LAYERS: dict[str, Any] = {"student_layers": ["conv1", "conv2"], "teacher_layers": ["layer2", "layer3"]}
REVIEW: dict[str, Any] = {"name": "review_kd", **LAYERS, "mid_channels": 8}
OWN = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
TEACHERS: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "the CIFAR ResNet": ({}, ["layer1.0.preact", "layer3.0.preact"], 16),
    "timm's ResNet": ({"model": "timm/test_resnet", "kwargs": {}, **OWN}, ["layer2", "layer4"], 32),
    "torchvision's MobileNet": (
        {"model": "torchvision/mobilenet_v3_small", "kwargs": {}, **OWN},
        ["features.1", "features.4"],
        32,
    ),
    "a ViT": (
        {"model": "timm/test_vit", "kwargs": {"img_size": 32, "patch_size": 8}, **OWN},
        ["blocks.0", "blocks.5"],
        32,
    ),
}


def review_run(base: Config, url: Path, **sections: Any) -> Config:
    return run_config(base, url, mode="online", **{"loss": [*CE, REVIEW], "student": NORMALISED, **sections})


def curve(run_url: Path, name: str = "loss/review_kd") -> list[float]:
    return [record[name] for record in metrics(run_url)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_learns_the_maps_of_another_family(replays: Replay, tmp_path: Path, name: str) -> None:
    teacher, layers, size = TEACHERS[name]
    term = {**REVIEW, "teacher_layers": layers}
    keys: dict[str, Any] = {"teacher": teacher, "views": {"size": size}, "train": {"epochs": 12, "lr": 0.01}}
    run(review_run(replays("crop").config, tmp_path, loss=[term], **keys))
    seen = curve(tmp_path)
    assert len(seen) == 60
    assert sum(seen[-5:]) < 0.7 * sum(seen[:5])


def test_the_network_learns_through_its_maps_and_not_the_fusion_alone(replays: Replay, tmp_path: Path) -> None:
    run(review_run(replays("crop").config, tmp_path, loss=[REVIEW], train={"epochs": 1}))
    fresh = load_model(
        review_run(replays("crop").config, tmp_path).student, widths={"logits": 10}, size=16, where="student"
    )
    before, after = fresh.module.network.state_dict(), state_of(tmp_path)["model"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"conv1.0.weight", "conv2.weight"} <= moved
    # No map reads the head.
    assert not {"fc.weight", "fc.bias"} & moved


def test_teacher_and_student_may_see_the_same_crop_at_their_own_sizes(replays: Replay, tmp_path: Path) -> None:
    run(review_run(replays("function_matching").config, tmp_path, student={**NORMALISED, "size": 20}))
    assert all(value > 0 for value in curve(tmp_path))


def test_the_teachers_maps_are_of_the_mixed_pixels(replays: Replay, tmp_path: Path) -> None:
    config = review_run(replays("function_matching").config, tmp_path)
    index_shards(config, tmp_path / "index")
    trainer = trainer_of(config)
    try:
        with closing(load_batches(trainer.setup.dataset, range(1), num_workers=0, pin_memory=False)) as batches:
            batch = next(batches)
        step = trainer.train_step
        inputs = step.loss_inputs(step.forward(torch.zeros(batch.num_rows, 3, 16, 16)), batch)
    finally:
        trainer.setup.close()
    (teacher,) = trainer.setup.supervision.teachers
    assert batch.partner_B is not None
    assert batch.lambda_B is not None
    own, weight = batch.pixels_BCHW / 255, batch.lambda_B.reshape(-1, 1, 1, 1)
    mixed = weight * own + (1 - weight) * own[batch.partner_B]
    mean, std = (
        torch.tensor(three).reshape(1, 3, 1, 1) for three in (teacher.loaded.input.mean, teacher.loaded.input.std)
    )
    network: Any = teacher.module.network
    with torch.no_grad():
        stem = network.bn1(network.conv1((mixed - mean) / std)).relu()
        layer2 = network.layer2(network.layer1(stem))
        expected = [layer2, network.layer3(layer2), network.layer3(layer2).mean((2, 3), keepdim=True)]
    (found,) = inputs.teachers
    assert found.teacher_maps is not None
    error = reordered(network_operations(teacher.module, torch.zeros(1, 3, 16, 16), backward=False))
    for one, other in zip(found.teacher_maps, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=error * magnitude_of(other))


def test_maps_in_bf16_cost_only_rounding(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    for precision in ("fp32", "bf16"):
        keys = {"teacher": {"precision": precision}, "train": {"precision": precision}}
        run(review_run(base, tmp_path / precision, loss=[REVIEW], **keys))
    exact, rounded = (torch.tensor(losses(tmp_path / precision)) for precision in ("fp32", "bf16"))
    # 7 units in the last place of bf16.
    torch.testing.assert_close(rounded, exact, rtol=ulps(7, dtype=torch.bfloat16), atol=0)
    assert not torch.equal(rounded, exact)


def test_the_checkpoint_holds_what_fuses_and_the_network_stays_as_it_is(replays: Replay, tmp_path: Path) -> None:
    config = review_run(replays("crop").config, tmp_path)
    run(config)
    found = state_of(tmp_path)
    assert {name.split(".")[0] for name in found["review"]} == {"fusions"}
    assert config.student is not None
    plain = load_model(config.student, widths={"logits": 10}, size=16, where="student").module.network.state_dict()
    assert found["model"].keys() == plain.keys()


@pytest.mark.parametrize(
    ("stop", "first_step"), [(("step", 3), 0), slow(("step", 8), 5), slow(("eval", 2), 10)], ids=str
)
def test_kill_and_resume_with_feature_maps_is_bitwise(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, int], first_step: int
) -> None:
    monkeypatch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 1)
    base = replays("function_matching").config
    keys: dict[str, Any] = {
        "data": {"val_shards": base.data.shards},
        "loss": [*CE, {**REVIEW, "warmup_epochs": 2}, {"name": "kd"}],
        "train": {"epochs": 3, "schedule": "cosine", "warmup_steps": 3, "clip_norm": 1.0},
    }
    check_resume(lambda url: review_run(base, url, **keys), tmp_path, stop=stop, first_step=first_step)


def train_unnormalised(config: Config, distributed: DistributedContext) -> None:
    """With the fusion's BatchNorm in eval mode, since the statistics would differ between ranks."""
    trainer = trainer_of(config, distributed)
    checkpoint.claim_run(trainer.setup.run_url, config)
    review = trainer.setup.student.module.review
    assert review is not None
    review.eval()
    try:
        trainer.run()
    finally:
        trainer.setup.close()


def train_in_group(rendezvous: Path, rank: int, body: str) -> None:
    with group(rendezvous, rank) as distributed:
        train_unnormalised(Config.model_validate_json(body), distributed)


@pytest.mark.slow
def test_two_ranks_review_as_one_process(replays: Replay, tmp_path: Path) -> None:
    """Plain SGD and batches of mixed pairs; the last step of an epoch gives one rank more rows than the other."""
    base = replays("function_matching").config
    keys: dict[str, Any] = {
        "student": SMALL,
        "train": {"epochs": 2, "global_batch_size": 12, "optimizer": "sgd", "momentum": 0.0, "lr": 0.05},
    }
    alone, two = (review_run(base, tmp_path / name, **keys) for name in ("alone", "two"))
    for config in (alone, two):
        assert config.run is not None
        index_shards(config, Path(config.run.url) / "index")
    train_unnormalised(alone, DistributedContext())
    body = two.model_dump_json(exclude_unset=True)
    run_two_ranks(train_in_group, tmp_path, body)
    expected = losses(tmp_path / "alone")
    # The fusion's layers are no more than the student's.
    error = training_error(alone, 2 * len(expected))
    assert_weights_close(state_of(tmp_path / "two")["model"], state_of(tmp_path / "alone")["model"], error)
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=error)


def test_a_layer_that_is_not_there_stops_a_run_before_it_is_claimed(replays: Replay, tmp_path: Path) -> None:
    config = review_run(
        replays("crop").config, tmp_path / "run", loss=[{**REVIEW, "student_layers": ["conv1", "conv7"]}]
    )
    index_shards(config, tmp_path / "run" / "index")
    with raises("model.unknown-layer"):
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()
