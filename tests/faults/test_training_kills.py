"""A worker of a training is killed and a node is lost: workers are restarted, and the results are the same."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.shards.writer import pack_shards
from pipeline.student.run import checkpoint
from tests.faults.builds import edited, steps_at, training_file
from tests.faults.drivers import log_of, start
from tests.jobs.clusters import head_with_folder, lose, worker_node
from tests.pipeline.caches import digit_samples
from tests.pipeline.student.runs import metrics
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS_PER_EPOCH = 50
NUM_EPOCHS = 5
NUM_STEPS = NUM_EPOCHS * STEPS_PER_EPOCH
WORKER = "ray::RayTrainWorker"


def config_file(folder: Path, name: str, shards: list[str], **ray: Any) -> Path:
    """Two ranks, 50 steps an epoch, a checkpoint every 8: BatchNorm, momentum, average and clipping have a state."""
    train = {
        "epochs": NUM_EPOCHS,
        "global_batch_size": 8,
        "lr": 0.01,
        "optimizer": "adamw",
        "clip_norm": 1.0,
        "ema": 0.99,
        "accumulate": 2,
        "warmup_steps": 5,
        "checkpoint_every_steps": 8,
    }
    return edited(training_file(folder, name, shards), train=train, data={"val_shards": shards[0]}, ray=ray)


def kill_a_worker_on(node: subprocess.Popen[bytes]) -> None:
    """Kills the worker in the session of the node."""
    victims = [process for process in psutil.process_iter(["cmdline"]) if _is_worker_on(node, process)]
    assert len(victims) == 1
    victims[0].kill()
    psutil.wait_procs(victims, timeout=30)


def _is_worker_on(node: subprocess.Popen[bytes], process: psutil.Process) -> bool:
    try:
        return " ".join(process.info["cmdline"] or ()).startswith(WORKER) and os.getsid(process.pid) == node.pid
    except ProcessLookupError:
        return False


def assert_bitwise(actual: Any, expected: Any) -> None:
    if isinstance(actual, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual.keys() - {"seconds"}:
            assert_bitwise(actual[key], expected[key])
    elif isinstance(actual, list | tuple):
        assert len(actual) == len(expected)
        for left, right in zip(actual, expected, strict=True):
            assert_bitwise(left, right)
    else:
        assert actual == expected


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_a_training_that_loses_a_worker_and_then_a_node_has_the_bits_of_an_undisturbed_one(
    disks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of one CPU each. The training waits for the second one; the lost node is replaced."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    shards = pack_shards(digit_samples(400), f"{tmp_path}/digits-%02d.tar", shard_size=80)
    undisturbed = config_file(tmp_path, "undisturbed", shards)
    assert start("train_student", undisturbed).wait(600) == 0, log_of(undisturbed)
    run = tmp_path / "disturbed"
    with ExitStack() as stack:
        head = stack.enter_context(head_with_folder(disks / "head", monkeypatch))
        # A busy machine may cost another start.
        keys = {"address": head.address, "wait_s": 120, "max_failures": 4}
        disturbed = config_file(tmp_path, "disturbed", shards, **keys)
        driver = start("train_student", disturbed)
        wait_until(lambda: "waiting up to 120 s for nodes" in log_of(disturbed), driver, partial(log_of, disturbed))
        first = stack.enter_context(worker_node(head, disks / "first"))
        wait_until(lambda: steps_at(run) > 0, driver, partial(log_of, disturbed))
        kill_a_worker_on(first)
        wait_until(lambda: steps_at(run) > STEPS_PER_EPOCH, driver, partial(log_of, disturbed))
        lose(first)
        stack.enter_context(worker_node(head, disks / "second"))
        assert driver.wait(600) == 0, log_of(disturbed)

    assert "start 3 of the workers" in log_of(disturbed)
    expected, actual = (metrics(tmp_path / name) for name in ("undisturbed", "disturbed"))
    assert [record["step"] for record in actual] == list(range(NUM_STEPS))
    assert actual == expected
    for name in (checkpoint.LAST, checkpoint.BEST):
        states = [checkpoint.load(str(tmp_path / run), name) for run in ("undisturbed", "disturbed")]
        assert states[0] is not None
        assert_bitwise(states[0], states[1])
