"""Real ranks over gloo: together they train like one process."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.core.errors import TrainingError
from pipeline.student.distributed import DistributedContext
from pipeline.student.losses import CompositeLoss, TeacherInputs
from pipeline.student.run import checkpoint
from pipeline.student.run.metrics_files import StepLog
from pipeline.student.training.trainer import train
from pipeline.tasks.classification import Classification
from schemas.config import Config, LossConfig
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.losses.batches import batch_share, loss_inputs, teacher_outputs
from tests.pipeline.student.runs import (
    CE,
    KD,
    NORMALISED,
    assert_weights_close,
    evaluations,
    losses,
    metrics,
    run_config,
    state_of,
    trainer_of,
    training_error,
)
from tests.pipeline.student.supervision.test_ensemble import online
from tests.ranks import forked, group, run_two_ranks
from tests.tolerances import magnitude_of, reordered, ulps

STEEP = 600
"""From row to row, a new student's probability of a class differs by 1/60 to 1/600 of itself. The gradient of its
correlation divides by that difference, so one ulp of a probability becomes up to 600 of the gradient."""


def train_all(rendezvous: Path, rank: int, bodies: list[str]) -> None:
    """Trains with each config in turn, and checks the evaluated buffers after the last; then computes the gathered
    steps, and the loss of one rank is NaN."""
    *configs, last = [Config.model_validate_json(body) for body in bodies]
    with group(rendezvous, rank) as distributed:
        # One rank has a notice that its node will be preempted: all must save.
        assert replace(distributed, preemption_notice=lambda: rank == 1).preemption_pending()
        assert not distributed.preemption_pending()
        for config in configs:
            train(config, distributed)
        trainer = trainer_of(last, distributed)
        trainer.run()
        trainer.setup.close()
        for name, buffer in trainer.setup.student.module.named_buffers():
            torch.testing.assert_close(distributed.sum(buffer.double()), 2 * buffer.double(), msg=name)
        save_steps(rendezvous, distributed, TWO_RANKS)
        log = StepLog(distributed)
        for step in (7, 8, 9):
            log.add(step, 1, 0.1, torch.tensor(math.nan if (step, rank) == (8, 1) else 1.0), {})
        with pytest.raises(TrainingError, match="first in step 8, seen between steps 7 and 9"):
            log.flush()


def train_with_two_ranks(configs: list[Config], folder: Path) -> None:
    bodies = [config.model_dump_json(exclude_unset=True) for config in configs]
    run_two_ranks(train_all, folder, bodies)


def compared_values(url: Path) -> list[float | None]:
    """Of all evaluations: those with a teacher, whichever rank ran it."""
    return [evaluation[name] for evaluation in evaluations(url) for name in ("agreement", "kl", "cosine")]


def interrupt(config: Config) -> None:
    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "eval" and event["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, report=report)


def test_two_ranks_train_as_one_process(replays: Replay, wide_caches: Replay, tmp_path: Path) -> None:
    """Plain SGD, so that weights differ as gradients do. The last step of an epoch has three rows: two for one rank,
    one for the other. One validation shard, so that one rank evaluates nothing. ``resumed`` was started by one
    process, no loss of ``untrained-head`` reads its logits, and ``two-teachers`` has two teachers with different input
    sizes. ``several-views`` has two views of each image in a batch."""
    base = replays("function_matching").config
    shards = base.data.shards
    assert shards is not None
    keys: dict[str, Any] = {
        "loss": [*CE, *KD],
        "data": {"val_shards": shards[0]},
        "train": {"epochs": 2, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1},
    }
    compared = {**keys, "train": {**keys["train"], "eval_agreement": True}}
    alone = run_config(base, tmp_path / "alone", **compared)
    train(alone)
    interrupt(run_config(base, tmp_path / "resumed", **compared))
    ranks = {"ray": {"num_workers": 2}}
    two = [run_config(base, tmp_path / "resumed", **compared, **ranks)]
    # A slow descent, since the gradients of dist are steep: see STEEP.
    gathering = {**keys, "loss": [*CE, {"name": "dist", "gather": True}], "train": {**keys["train"], "lr": 0.01}}
    untrained_head = {**compared, "loss": [{"name": "sifn"}]}
    for name, changed in (("gathered", gathering), ("untrained-head", untrained_head)):
        train(run_config(base, tmp_path / f"{name}-alone", **changed))
        two.append(run_config(base, tmp_path / name, **changed, **ranks))
    caches = replays("function_matching"), wide_caches("function_matching")
    train(online(tmp_path / "two-teachers-alone", *caches, **keys))
    two.append(online(tmp_path / "two-teachers", *caches, **keys, **ranks))
    # As many steps: twice the rows, in batches of twice the size.
    several = {**compared, "train": {**compared["train"], "views_per_image": 2, "global_batch_size": 16}}
    train(run_config(replays("repeated").config, tmp_path / "several-views-alone", **several))
    two.append(run_config(replays("repeated").config, tmp_path / "several-views", **several, **ranks))
    tokens = {
        **keys,
        "loss": [{"name": "token_cosine", "student_layer": "conv1"}, {"name": "token_mse", "student_layer": "conv2"}],
        "teacher": {"tokens_layer": "layer2", "tokens_grid": 4, "mode": "online"},
    }
    train(online(tmp_path / "tokens-alone", replays("function_matching"), **tokens))
    two.append(online(tmp_path / "tokens", replays("function_matching"), **tokens, **ranks))
    # BatchNorm has separate statistics on each rank; both evaluate with those of the checkpoint.
    normalised = {**keys, "student": NORMALISED, "data": {"val_shards": shards}}
    normalised["train"] = {**keys["train"], "global_batch_size": 12}
    train_with_two_ranks([*two, run_config(base, tmp_path / "normalised", **normalised, **ranks)], tmp_path)

    names = ("untrained-head", "two-teachers", "tokens", "several-views", "gathered")
    pairs = {"resumed": "alone"} | {name: f"{name}-alone" for name in names}
    for name, alone_name in pairs.items():
        error = ulps(10 * STEEP) if name == "gathered" else training_error(alone, 10)
        assert_weights_close(state_of(tmp_path / name)["model"], state_of(tmp_path / alone_name)["model"], error)
        assert [record["step"] for record in metrics(tmp_path / name)] == list(range(10))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / alone_name), rel=error)
        summaries = [checkpoint.read_summary(str(tmp_path / run)) for run in (name, alone_name)]
        actual, expected = ((summary["top1"], summary["ece"]) for summary in summaries if summary is not None)
        assert actual == pytest.approx(expected, abs=error)
        assert compared_values(tmp_path / name) == pytest.approx(compared_values(tmp_path / alone_name), abs=error)
    assert_steps_of_the_global_batch(tmp_path, TWO_RANKS)


@pytest.mark.slow
def test_two_ranks_accumulate_clip_and_average_as_one_process(replays: Replay, tmp_path: Path) -> None:
    """Micro-batches of one pair on each rank, of two in one process; part of the student is frozen,
    and rows are weighted."""
    base = replays("function_matching").config
    keys: dict[str, Any] = {
        "loss": [*CE, *KD],
        "data": {"val_shards": base.data.shards},
        "train": {
            "epochs": 3,
            "optimizer": "sgd",
            "momentum": 0.0,
            "lr": 0.1,
            "tail": "short",
            "accumulate": 2,
            "clip_norm": 0.5,
            "ema": 0.9,
            "freeze": ["conv1"],
            "balance": {"power": 1.0},
            "gradient_norms_every_steps": 1,
        },
    }
    alone = run_config(base, tmp_path / "alone", **keys)
    train(alone)
    train_with_two_ranks([run_config(base, tmp_path / "two", **keys, ray={"num_workers": 2})], tmp_path)
    records = [metrics(tmp_path / name) for name in ("alone", "two")]
    error = training_error(alone, len(records[0]))
    for key in ("loss", "grad_norm", "gradient_norm/ce", "gradient_norm/kd"):
        alone_values, values = ([record[key] for record in run] for run in records)
        assert values == pytest.approx(alone_values, rel=error)
    assert max(record["grad_norm"] for record in records[0]) > 0.5
    for kind in ("model", "raw"):
        assert_weights_close(state_of(tmp_path / "two")[kind], state_of(tmp_path / "alone")[kind], error)


GATHERED: tuple[LossConfig, ...] = Config.model_validate(
    {"loss": [*CE, {"name": "dist", "temperature": 2.0, "inter_weight": 0.5, "intra_weight": 3.0, "gather": True}]}
).loss
NUM_FEATURES, NUM_CLASSES = 4, 6


def one_step(distributed: DistributedContext, sizes: list[int], side: int) -> tuple[Tensor, Tensor]:
    """Total and gradient on this rank of a linear student, of ``side²`` pixels a row, after DDP's mean over ranks."""
    rows = slice(sum(sizes[: distributed.rank]), sum(sizes[: distributed.rank + 1]))
    generator = torch.Generator().manual_seed(3)
    images, teacher = (
        torch.randn(sum(sizes), channels, side, side, generator=generator)[rows]
        for channels in (NUM_FEATURES, NUM_CLASSES)
    )
    labels_B = torch.randint(NUM_CLASSES, (sum(sizes),), generator=generator)[rows]
    student: nn.Module = nn.Conv2d(NUM_FEATURES, NUM_CLASSES, 1, bias=False)
    weight = nn.Parameter(torch.randn(NUM_CLASSES, NUM_FEATURES, 1, 1, generator=generator))
    student.weight = weight
    if distributed.size > 1:
        student = DistributedDataParallel(student)
    logits = student(images)
    loss = CompositeLoss(GATHERED if side == 1 else GATHERED[1:], Classification("cls", 10), where="a test")
    num = labels_B.numel()
    total, values = loss(
        loss_inputs(
            logits.flatten(1) if side == 1 else logits,
            labels_B,
            teachers=(
                TeacherInputs(
                    outputs=teacher_outputs({None: teacher.flatten(1) if side == 1 else teacher}, labels_B.float())
                ),
            ),
            sum_over_ranks=distributed.sum_with_gradient,
        ),
        batch_share(
            world_size=distributed.size,
            num_rows=num,
            num_rows_global=sum(sizes),
            num_labelled=num,
            num_labelled_global=sum(sizes),
        ),
        epoch=0,
    )
    total.backward()
    assert weight.grad is not None
    return values["dist"], weight.grad


Splits = list[tuple[list[int], int]]
"""Rows of each rank, and the side of an image."""
# Even and uneven ranks, one row a rank, a rank without rows, logits of pixels.
TWO_RANKS: Splits = [([4, 4], 1), ([5, 2], 1), ([1, 1], 1), ([7, 1], 2), ([3, 0], 2)]
THREE_RANKS: Splits = [([3, 3, 3], 1), ([3, 2, 2], 1), ([1, 6, 2], 1), ([2, 0, 1], 2)]


def save_steps(rendezvous: Path, distributed: DistributedContext, splits: Splits) -> None:
    steps = [one_step(distributed, *split) for split in splits]
    torch.save(steps, rendezvous.with_name(f"rank-{distributed.rank}.pt"))


def assert_steps_of_the_global_batch(folder: Path, splits: Splits) -> None:
    """Gathered dist has the value and the gradient of the global batch on each rank."""
    for number, (sizes, side) in enumerate(splits):
        expected = one_step(DistributedContext(), [sum(sizes)], side)
        # Softmax, means and sums of products over features, classes and rows, and their gradients.
        num_operations = 8 * (NUM_FEATURES + NUM_CLASSES + sum(sizes) * side**2)
        for rank in range(len(sizes)):
            saved = torch.load(folder / f"rank-{rank}.pt", weights_only=True)[number]
            for actual, whole in zip(saved, expected, strict=True):
                torch.testing.assert_close(actual, whole, rtol=0, atol=reordered(num_operations, magnitude_of(whole)))


def save_steps_of_three(rendezvous: Path, rank: int) -> None:
    with group(rendezvous, rank, 3) as distributed:
        save_steps(rendezvous, distributed, THREE_RANKS)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_parity_gathered_dist_has_the_value_and_gradient_of_the_global_batch_on_three_ranks(tmp_path: Path) -> None:
    """``test_two_ranks_train_as_one_process`` has it on two."""
    ranks = [forked().Process(target=save_steps_of_three, args=(tmp_path / "rendezvous", rank)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
        assert process.exitcode == 0
    assert_steps_of_the_global_batch(tmp_path, THREE_RANKS)
