"""Real ranks over gloo: together they train like one process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.core.errors import TrainingError
from pipeline.student.data.teacher_outputs import TeacherOutputs
from pipeline.student.distributed import DistributedContext
from pipeline.student.losses import BatchShare, CompositeLoss, LossInputs, TeacherInputs
from pipeline.student.run import checkpoint
from pipeline.student.run.metrics_files import StepLog
from pipeline.student.training.trainer import train
from schemas.config import Config, LossConfig
from tests.marks import slow
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import (
    CE,
    KD,
    NORMALISED,
    assert_weights_close,
    metrics,
    run_config,
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
    """Trains with each config in turn, and checks the evaluated buffers after the last; then the loss of one rank is
    NaN."""
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
        log = StepLog(distributed)
        for step in (7, 8, 9):
            log.add(step, 1, 0.1, torch.tensor(math.nan if (step, rank) == (8, 1) else 1.0), {})
        with pytest.raises(TrainingError, match="first in step 8, seen between steps 7 and 9"):
            log.flush()


def train_with_two_ranks(configs: list[Config], folder: Path) -> None:
    bodies = [config.model_dump_json(exclude_unset=True) for config in configs]
    run_two_ranks(train_all, folder, bodies)


def state_of(url: Path) -> dict[str, Any]:
    state = checkpoint.load(str(url), checkpoint.LAST)
    assert state is not None
    return state


def weights(url: Path) -> dict[str, torch.Tensor]:
    return state_of(url)["model"]


def compared_values(url: Path) -> Iterator[float | None]:
    """Of all evaluations: those with a teacher, whichever rank ran it."""
    for line in (url / "evaluations.jsonl").read_text().splitlines():
        yield from (json.loads(line)[name] for name in ("agreement", "kl", "cosine"))


def interrupt(config: Config) -> None:
    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "eval" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, report=report)


def test_two_ranks_train_as_one_process(replays: Replay, wide_caches: Replay, tmp_path: Path) -> None:
    """Plain SGD, so that weights differ as gradients do. The last step of an epoch has three rows: two for one rank,
    one for the other. One validation shard, so that one rank evaluates nothing. ``resumed`` was started by one
    process, no loss of ``untrained-head`` reads its logits, and ``two-teachers`` has two teachers with different input
    sizes."""
    base = replays("function_matching").config
    shards = base.data.shards
    assert shards is not None
    keys: dict[str, Any] = {
        "loss": [*CE, *KD],
        "data": {"val_shards": shards[0]},
        "train": {"epochs": 3, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1},
    }
    compared = {**keys, "train": {**keys["train"], "eval_agreement": True}}
    alone = run_config(base, tmp_path / "alone", **compared)
    train(alone)
    interrupt(run_config(base, tmp_path / "resumed", **compared))
    ranks = {"ray": {"num_workers": 2}}
    two = [run_config(base, tmp_path / name, **compared, **ranks) for name in ("two", "resumed")]
    # A slow descent, since the gradients of dist are steep: see STEEP.
    gathering = {**keys, "loss": [*CE, {"name": "dist", "gather": True}], "train": {**keys["train"], "lr": 0.01}}
    untrained_head = {**compared, "loss": [{"name": "sifn"}]}
    for name, changed in (("gathered", gathering), ("untrained-head", untrained_head)):
        train(run_config(base, tmp_path / f"{name}-alone", **changed))
        two.append(run_config(base, tmp_path / name, **changed, **ranks))
    caches = replays("function_matching"), wide_caches("function_matching")
    train(online(tmp_path / "two-teachers-alone", *caches, **keys))
    two.append(online(tmp_path / "two-teachers", *caches, **keys, **ranks))
    # BatchNorm has separate statistics on each rank; both evaluate with those of the checkpoint.
    normalised = {**keys, "student": NORMALISED, "data": {"val_shards": shards}}
    normalised["train"] = {**keys["train"], "global_batch_size": 12}
    train_with_two_ranks([*two, run_config(base, tmp_path / "normalised", **normalised, **ranks)], tmp_path)

    pairs = {"two": "alone", "resumed": "alone"} | {
        name: f"{name}-alone" for name in ("untrained-head", "two-teachers", "gathered")
    }
    for name, one in pairs.items():
        error = ulps(15 * STEEP) if name == "gathered" else training_error(alone, 15)
        assert_weights_close(weights(tmp_path / name), weights(tmp_path / one), error)
        records = metrics(tmp_path / name)
        assert [record["step"] for record in records] == list(range(15))
        losses = [[record["loss"] for record in metrics(tmp_path / run)] for run in (one, name)]
        assert losses[1] == pytest.approx(losses[0], rel=error)
        summaries = [checkpoint.read_summary(str(tmp_path / run)) for run in (name, one)]
        found, expected = ((summary["top1"], summary["ece"]) for summary in summaries if summary is not None)
        assert found == pytest.approx(expected, abs=error)
        assert [*compared_values(tmp_path / name)] == pytest.approx([*compared_values(tmp_path / one)], abs=error)


@pytest.mark.slow
def test_two_ranks_accumulate_clip_and_average_as_one_process(replays: Replay, tmp_path: Path) -> None:
    """Micro-batches of one pair on each rank, of two in one process; part of the student is frozen."""
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
        },
    }
    alone = run_config(base, tmp_path / "alone", **keys)
    train(alone)
    train_with_two_ranks([run_config(base, tmp_path / "two", **keys, ray={"num_workers": 2})], tmp_path)
    records = [metrics(tmp_path / name) for name in ("alone", "two")]
    error = training_error(alone, len(records[0]))
    for key in ("loss", "grad_norm"):
        one, other = ([record[key] for record in found] for found in records)
        assert other == pytest.approx(one, rel=error)
    assert max(record["grad_norm"] for record in records[0]) > 0.5
    for kind in ("model", "raw"):
        one, other = (state_of(tmp_path / name)[kind] for name in ("alone", "two"))
        assert_weights_close(other, one, error)


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
    loss = CompositeLoss(GATHERED if side == 1 else GATHERED[1:], where="a test")
    num = labels_B.numel()
    total, values = loss(
        LossInputs(
            student_BK=logits.flatten(1) if side == 1 else logits,
            labels_B=labels_B,
            teachers=(
                TeacherInputs(
                    outputs=TeacherOutputs({None: teacher.flatten(1) if side == 1 else teacher}, labels_B.float())
                ),
            ),
            sum_over_ranks=distributed.sum_with_gradient,
        ),
        BatchShare(
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


def save_steps(rendezvous: Path, rank: int, splits: list[tuple[list[int], int]]) -> None:
    with group(rendezvous, rank, len(splits[0][0])) as distributed:
        torch.save([one_step(distributed, *split) for split in splits], rendezvous.with_name(f"rank-{rank}.pt"))


@pytest.mark.parametrize(
    "splits",
    [
        slow([([4, 4], 1), ([5, 2], 1), ([1, 1], 1), ([7, 1], 2)]),
        [([3, 3, 3], 1), ([3, 2, 2], 1), ([1, 6, 2], 1), ([2, 0, 1], 2)],
    ],
    ids=["2 ranks", "3 ranks"],
)
def test_parity_gathered_dist_has_the_value_and_gradient_of_the_global_batch_on_any_ranks(
    tmp_path: Path, splits: list[tuple[list[int], int]]
) -> None:
    """Even and uneven ranks, one row a rank, a rank without rows, logits of pixels."""
    ranks = [
        forked().Process(target=save_steps, args=(tmp_path / "rendezvous", rank, splits))
        for rank in range(len(splits[0][0]))
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
        assert process.exitcode == 0
    for number, (sizes, side) in enumerate(splits):
        expected = one_step(DistributedContext(), [sum(sizes)], side)
        # Softmax, means and sums of products over features, classes and rows, and their gradients.
        num_operations = 8 * (NUM_FEATURES + NUM_CLASSES + sum(sizes) * side**2)
        for rank in range(len(sizes)):
            found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)[number]
            for actual, whole in zip(found, expected, strict=True):
                torch.testing.assert_close(actual, whole, rtol=0, atol=reordered(num_operations, magnitude_of(whole)))
