"""A process that a signal ends is reported with the signal and a remedy."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.exceptions import OutOfMemoryError
from ray.train import WorkerGroupError

from jobs.ray.train_internals import RayTrainer
from jobs.train_student import train_student
from pipeline.core.errors import TrainingError
from pipeline.student.training.trainer import train
from tests.errors import raises
from tests.jobs.conftest import NETWORK, Tree, config_of
from tests.jobs.programs import run_python
from tests.marks import slow

ROOT = Path(__file__).resolve().parents[2]
TWO = {"address": "local", "num_workers": 2}


def killed_at(tree: Tree, number: signal.Signals, **sections: Any) -> dict[str, Any]:
    """A training whose process a signal ends in its third step."""
    kwargs = {"number": int(number), "forwards": 3}
    student = {**NETWORK, "model": "python:tests.jobs.networks:Killed", "kwargs": kwargs}
    return tree(teacher={"mode": "none"}, loss=[{"name": "ce"}], student=student, **sections)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGSEGV, "Segmentation fault"),
        slow(signal.SIGBUS, "Bus error"),
        slow(signal.SIGABRT, "Aborted"),
    ],
)
@pytest.mark.exhaustive
def test_a_command_that_a_signal_ends_names_it_on_stderr(
    tree: Tree, tmp_path: Path, number: signal.Signals, text: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(killed_at(tree, number)))
    code = "import sys; from jobs.cli import main; sys.argv = ['stillroom', 'train', sys.argv[1]]; main()"
    done = run_python("-c", code, path, cwd=ROOT)
    assert done.returncode == -number
    assert f"Fatal Python error: {text}" in done.stderr
    assert "networks.py" in done.stderr


def test_a_loader_process_that_is_killed_is_one_message(
    tree: Tree, built_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 1)
    data = {"cache": str(built_cache)}
    training = config_of(tree(data=data, train={"epochs": 50, "global_batch_size": 24, "num_workers": 1}))

    killed = []

    def report(event: dict[str, Any]) -> None:
        if event.get("step") == 2:
            (loader,) = multiprocessing.active_children()
            assert loader.pid is not None
            killed.append(loader.pid)
            os.kill(loader.pid, signal.SIGKILL)

    with raises("train.loader-killed", TrainingError) as caught:
        train(training, report=report)
    (pid,) = killed  # torch names the signal only if its handler comes before its queue's timeout
    assert str(pid) in str(caught.value.got)
    assert "train.num_workers" in str(caught.value.next_step)


def test_a_killed_loader_process_whose_socket_closes_first_is_the_same_message(
    tree: Tree, built_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel closes a process's sockets, then reports its death: a batch can travel in between."""
    killed, without_loaders = [], {*multiprocessing.active_children()}

    def detach(_: object) -> int:
        (loader,) = {*multiprocessing.active_children()} - without_loaders
        assert loader.pid is not None
        killed.append(loader.pid)
        threading.Timer(0.2, os.kill, (loader.pid, signal.SIGKILL)).start()
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("multiprocessing.resource_sharer.DupFd.detach", detach)
    training = config_of(tree(data={"cache": str(built_cache)}, train={"num_workers": 1}))
    with raises("train.loader-killed", TrainingError) as caught:
        train(training)
    assert str(killed[0]) in str(caught.value.got)
    assert "illed" in str(caught.value.got)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_a_signal_ends_is_one_message(tree: Tree) -> None:
    with raises("train.worker-killed", TrainingError) as caught:
        train_student(config_of(killed_at(tree, signal.SIGSEGV, ray=TWO)))
    assert "SIGSEGV" in str(caught.value.got)
    assert "train.channels_last=false" in str(caught.value.next_step)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_the_memory_monitor_ends_is_the_same_message(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory limits hold for whole nodes, so the failure is the one that Ray Train would report."""
    failures: dict[int, Exception] = {0: RuntimeError("Connection closed by peer"), 1: OutOfMemoryError("killed")}

    def fit(_: RayTrainer) -> None:
        raise WorkerGroupError("two workers failed", failures)

    monkeypatch.setattr(RayTrainer, "fit", fit)
    with raises("train.worker-killed", TrainingError, where="rank 1") as caught:
        train_student(config_of(tree(teacher={"mode": "none"}, loss=[{"name": "ce"}], ray=TWO)))
    assert "killed" in str(caught.value.got)
