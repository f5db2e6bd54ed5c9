"""A worker of a training is killed: Ray Train starts the workers again, and nothing of it is to be seen later."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from pipeline.shards.write import pack_shards
from pipeline.student import checkpoint
from tests.faults.test_kills import said, start, training_file, write
from tests.pipeline.caches import digit_samples

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS_PER_EPOCH = 50
NUM_STEPS = 3 * STEPS_PER_EPOCH
WORKER = "ray::RayTrainWorker"


def config_file(folder: Path, name: str, shards: list[str]) -> Path:
    """Two ranks, 50 steps an epoch, a checkpoint every 8: BatchNorm, momentum, average and clipping have a state."""
    path = training_file(folder, name, shards)
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    tree["train"] = {
        "epochs": 3,
        "global_batch_size": 8,
        "lr": 0.01,
        "optimizer": "adamw",
        "clip_norm": 1.0,
        "ema": 0.99,
        "accumulate": 2,
        "warmup_steps": 5,
        "checkpoint_every_steps": 8,
    }
    tree["data"]["val_shards"] = shards[0]
    tree["ray"]["max_failures"] = 1
    return write(path, tree)


def workers_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Ray starts its processes below the driver, so no other session's are among them."""
    found: list[psutil.Process] = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(WORKER):
                found.append(process)
        except psutil.Error:
            continue
    return found


def steps_at(run: Path) -> int:
    """Where the last checkpoint stands; 0: there is none yet."""
    state = checkpoint.load(str(run), checkpoint.LAST)
    return 0 if state is None else state["step"]


def kill_one_in_the_midst_of_an_epoch(driver: subprocess.Popen[bytes], run: Path, log: Path) -> int:
    """Kills a worker once there is a checkpoint after the first epoch. Returns that checkpoint's step."""
    deadline = time.monotonic() + 180
    while (step := steps_at(run)) <= STEPS_PER_EPOCH:
        assert time.monotonic() < deadline, said(log)
        assert driver.poll() is None, said(log)
        time.sleep(0.05)
    victims = workers_of(driver)
    assert len(victims) == 2
    victims[1].kill()
    psutil.wait_procs(victims[1:], timeout=30)
    return step


def metrics(run: Path) -> Sequence[dict[str, float]]:
    return [json.loads(line) for line in (run / checkpoint.METRICS).read_text().splitlines()]


def assert_bitwise(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds"}:
            assert_bitwise(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_bitwise(left, right)
    else:
        assert one == other


@pytest.mark.timeout(900)
def test_a_training_whose_worker_is_killed_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    shards = pack_shards(digit_samples(400), f"{tmp_path}/digits-%02d.tar", shard_size=80)
    undisturbed, killed = (config_file(tmp_path, name, shards) for name in ("undisturbed", "killed"))
    assert start("train_student", undisturbed).wait(300) == 0, said(undisturbed)
    driver = start("train_student", killed)
    step = kill_one_in_the_midst_of_an_epoch(driver, tmp_path / "killed", killed)
    assert driver.wait(300) == 0, said(killed)
    print(f"\nkilled after the checkpoint of step {step} of {NUM_STEPS}")

    one, other = (metrics(tmp_path / name) for name in ("undisturbed", "killed"))
    assert [record["step"] for record in other] == list(range(NUM_STEPS))
    assert other == one
    for name in (checkpoint.LAST, checkpoint.BEST):
        states = [checkpoint.load(str(tmp_path / run), name) for run in ("undisturbed", "killed")]
        assert states[0] is not None
        assert_bitwise(states[0], states[1])
