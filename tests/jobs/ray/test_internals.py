"""The adapter to Ray's internals: what it returns with the installed Ray, and that no other module imports them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from ray.train import WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller.state import RestartingState, RunningState, SchedulingState
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from jobs.ray import core_internals, train_internals
from tests.jobs.clusters import free_port

ROOT = Path(__file__).resolve().parents[3]


def ray_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            yield str(node.module)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ray")


def test_only_the_adapter_imports_ray_s_internals() -> None:
    internal = ("_", "v2", "core")
    importing = {
        path.stem
        for path in (ROOT / "jobs").rglob("*.py")
        if any(part.startswith(internal) for name in ray_imports(path) for part in name.split(".")[1:])
    }
    assert importing == {"core_internals", "train_internals"}


def test_the_default_folder_is_the_one_that_ray_tmpdir_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/some/folder")
    assert core_internals.default_temp_dir().startswith("/some/folder")


def test_a_health_check_of_a_closed_port_raises() -> None:
    with pytest.raises(grpc.RpcError):
        core_internals.check_alive(f"127.0.0.1:{free_port()}", timeout_s=0.2)


class Recorder(train_internals.WorkerGroupCallback):
    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def on_start(self) -> None:
        self.events.append(("start", None))

    def on_running(self, num_workers: int | None) -> None:
        self.events.append(("running", num_workers))

    def on_waiting(self, *, repeated: bool) -> None:
        self.events.append(("waiting", repeated))


def test_the_controller_s_states_become_three_events() -> None:
    recorder = Recorder()
    lost = RestartingState(WorkerGroupError("a node is gone", {0: RuntimeError("gone")}))
    resized = SchedulingState(ResizeDecision(num_workers=6, resources_per_worker={"CPU": 1}))
    unchanged = SchedulingState(NoopDecision())
    recorder.after_controller_start(None)
    for previous, current in [
        (resized, RunningState()),
        (RunningState(), lost),
        (lost, lost),
        (unchanged, RunningState()),
    ]:
        recorder.after_controller_state_update(previous, current)
    assert recorder.events == [
        ("start", None),
        ("running", 6),
        ("waiting", False),
        ("waiting", True),
        ("running", None),
    ]


def callback_names(trainer: type[TorchTrainer]) -> set[str]:
    return {type(callback).__name__ for callback in trainer(print)._create_default_callbacks()}


def test_only_the_cleaner_that_may_query_another_cluster_is_left_out() -> None:
    expected = callback_names(TorchTrainer) - {"PlacementGroupCleanerCallback"}
    assert expected < callback_names(TorchTrainer)
    assert callback_names(train_internals.RayTrainer) == expected
