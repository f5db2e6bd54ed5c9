"""Two real ranks over gloo: together they are one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.errors import TrainingError
from pipeline.student import checkpoint
from pipeline.student.loop import Trainer, train
from pipeline.student.metrics import StepLog
from pipeline.student.world import World
from schemas.config import Config
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import CE, KD, NORMALISED, metrics, run_config


@contextmanager
def group(rendezvous: Path, rank: int) -> Iterator[World]:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        yield World(rank=rank, size=2)
    finally:
        dist.destroy_process_group()


def train_all(rendezvous: Path, rank: int, bodies: list[str]) -> None:
    """Trains by each config in turn, by the last with a look at the buffers that were evaluated; then one rank's loss
    is not a number."""
    *configs, last = [Config.model_validate_json(body) for body in bodies]
    with group(rendezvous, rank) as world:
        for config in configs:
            train(config, world)
        trainer = Trainer(last, world, lambda _: None)
        trainer.run()
        trainer.close()
        for name, buffer in trainer.student.named_buffers():
            torch.testing.assert_close(world.sum(buffer.double()), 2 * buffer.double(), msg=name)
        log = StepLog(world)
        for step in (7, 8, 9):
            log.add(step, 1, 0.1, torch.tensor(math.nan if (step, rank) == (8, 1) else 1.0), {})
        with pytest.raises(TrainingError, match="first in step 8, seen between steps 7 and 9"):
            log.flush()


def train_with_two_ranks(configs: list[Config], folder: Path) -> None:
    """This process is rank 0."""
    bodies = [config.model_dump_json(exclude_unset=True) for config in configs]
    other = mp.get_context("spawn").Process(target=train_all, args=(folder / "rendezvous", 1, bodies))
    other.start()
    try:
        train_all(folder / "rendezvous", 0, bodies)
        other.join(60)
    finally:
        other.kill()
        other.join()
    assert other.exitcode == 0


def state_of(url: Path) -> dict[str, Any]:
    state = checkpoint.load(str(url), checkpoint.LAST)
    assert state is not None
    return state


def weights(url: Path) -> dict[str, torch.Tensor]:
    return state_of(url)["model"]


def interrupt(config: Config) -> None:
    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "eval" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, report=report)


def test_two_ranks_train_as_one_process(replays: Replay, tmp_path: Path) -> None:
    """Plain SGD, so that weights differ as gradients do. The last step of an epoch has three rows: two for one rank,
    one for the other. One validation shard, so that one rank evaluates nothing. ``grown`` was begun by one process."""
    base = replays("function_matching").config
    shards = base.data.shards
    assert shards is not None
    keys: dict[str, Any] = {
        "loss": [*CE, *KD],
        "data": {"val_shards": shards[0]},
        "train": {"epochs": 3, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1},
    }
    alone = run_config(base, tmp_path / "alone", **keys)
    train(alone)
    interrupt(run_config(base, tmp_path / "grown", **keys))
    ranks = {"ray": {"num_workers": 2}}
    two = [run_config(base, tmp_path / name, **keys, **ranks) for name in ("two", "grown")]
    # BatchNorm has statistics of its own on each rank; both evaluate with those of the checkpoint.
    normalised = {**keys, "student": NORMALISED, "data": {"val_shards": shards}}
    normalised["train"] = {**keys["train"], "global_batch_size": 12}
    train_with_two_ranks([*two, run_config(base, tmp_path / "normalised", **normalised, **ranks)], tmp_path)

    wanted = weights(tmp_path / "alone")
    for name in ("two", "grown"):
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6)
        records = metrics(tmp_path / name)
        assert [record["step"] for record in records] == list(range(15))
        losses = torch.tensor([[record["loss"] for record in metrics(tmp_path / run)] for run in ("alone", name)])
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        one, other = (checkpoint.read_summary(str(tmp_path / run)) for run in ("alone", name))
        assert one is not None
        assert other is not None
        assert (other["top1"], other["ece"]) == pytest.approx((one["top1"], one["ece"]), abs=1e-5)


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
    for key in ("loss", "grad_norm"):
        one, other = ([record[key] for record in found] for found in records)
        assert other == pytest.approx(one, rel=1e-5)
    assert max(record["grad_norm"] for record in records[0]) > 0.5
    for kind in ("model", "raw"):
        one, other = (state_of(tmp_path / name)[kind] for name in ("alone", "two"))
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6)
