"""Train a student with DDP under Ray Train. ``python -m jobs.train_student CONFIG [k.k=v …]``."""

from __future__ import annotations

import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from jobs.entry import config_command
from jobs.index_shards import index_shards
from jobs.paths import with_absolute_paths
from jobs.progress import ProgressView
from jobs.ray_runtime import cluster, require_resources
from pipeline import storage
from pipeline.config import load_config
from pipeline.errors import ConfigError, InputError, StillroomError, TrainingError
from pipeline.student.checkpoint import check_begun, read_summary
from pipeline.student.loop import train
from pipeline.student.preflight import check_config, check_training
from pipeline.student.sources import index_url
from pipeline.student.world import World
from schemas.config import Config

_POLL_S = 0.5


def train_student(config: Config, *, device: torch.device | None = None) -> dict[str, Any]:
    """Trains to the end, from wherever the run stands, and returns its summary. Indexes the shards first where a run
    without a cache has no index yet.

    Args:
        device: of a training without Ray; None: the CPU.

    Raises:
        StillroomError: bad input, too few resources, or a training that failed for good.
    """
    config = with_absolute_paths(config)
    run_url = check_config(config)
    check_begun(run_url, config)
    if (summary := read_summary(run_url)) is not None:
        print(f"{_name(run_url)}: finished before; nothing to do", file=sys.stderr)
        return summary
    check_training(config)
    storage.probe(run_url)
    if config.ray.address == "none":
        return _train_here(config, World() if device is None else World(device=device))
    with cluster(config.ray):
        _ensure_index(config)
        return _fit(config)


def _train_here(config: Config, world: World) -> dict[str, Any]:
    """One process, no Ray."""
    if config.ray.num_workers > 1 or config.ray.use_gpu:
        raise ConfigError(
            "several workers and GPUs are Ray's to give",
            where="ray.address",
            got=f"none, with num_workers={config.ray.num_workers}, use_gpu={config.ray.use_gpu}",
            next_step="set ray.address=local, or ray.num_workers=1 and ray.use_gpu=false",
        )
    _ensure_index(config)
    with TrainingView() as view:
        return train(config, world, view.show)


def _ensure_index(config: Config) -> None:
    if config.teacher.mode != "cache":
        index_shards(config, index_url(config))


class TrainingView:
    """Shows what a training reports."""

    def __init__(self) -> None:
        self._view: ProgressView | None = None

    def __enter__(self) -> TrainingView:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._view is not None:
            self._view.__exit__(*error)

    def show(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "warning":
            self._warn(f"{_name(event['run'])}: warning: {event['text']}")
        elif kind == "begin":
            self._view = ProgressView(_name(event["run"]), event["total_steps"], done=event["first_step"]).__enter__()
        elif self._view is not None and kind == "step":
            self._view.update(event["step"] + 1, _note(event))
        elif self._view is not None and kind == "eval" and event["top1"] is not None:
            self._view.say(f"{_name(event['run'])}: epoch {event['epoch']}, top-1 {event['top1']:.2%}")

    def _warn(self, text: str) -> None:
        # Below a bar that is being drawn, a line would be drawn over.
        if self._view is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._view.say(text)


def _note(event: dict[str, Any]) -> str:
    """How it goes since it was last said."""
    return f"loss {event['loss']:.4f}, {event['images_per_s']:.0f} images/s, {event['data_wait']:.0%} waiting for data"


def _name(run_url: str) -> str:
    return f"train {run_url.rstrip('/').rsplit('/', 1)[-1]}"


@ray.remote(num_cpus=0)
class Relay:
    """What workers tell the driver: events to show, and the error that a person should read."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._error: StillroomError | None = None

    def push(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events

    def fail(self, error: StillroomError) -> None:
        # Where one rank fails the others lose their peer: the first error is the one that explains the rest.
        self._error = self._error or error

    def error(self) -> StillroomError | None:
        return self._error

    def begin(self) -> StillroomError | None:
        """Called by each worker of a new or restarted group: the bad input that a restart cannot mend, if any."""
        if self._error is not None and self._error.exit_code != InputError.exit_code:
            self._error = None
        return self._error


def _worker(arguments: dict[str, Any]) -> None:
    """One DDP rank, in a process that Ray Train started."""
    relay = arguments["relay"]
    if (fatal := ray.get(relay.begin.remote())) is not None:
        raise fatal
    context = get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    try:
        train(Config.model_validate_json(arguments["config"]), world, report=lambda event: relay.push.remote(event))
    except StillroomError as error:
        ray.get(relay.fail.remote(error))
        raise


def _fit(config: Config) -> dict[str, Any]:
    ray_config = config.ray
    per_worker = {"CPU": float(ray_config.cpus_per_worker), **({"GPU": 1.0} if ray_config.use_gpu else {})}
    require_resources(
        {name: amount * ray_config.num_workers for name, amount in per_worker.items()},
        what=f"training with {ray_config.num_workers} workers",
        where=f"ray.num_workers={ray_config.num_workers}, ray.cpus_per_worker={ray_config.cpus_per_worker}, "
        f"ray.use_gpu={ray_config.use_gpu}",
    )
    relay = Relay.remote()
    with tempfile.TemporaryDirectory(prefix="stillroom-ray-", ignore_cleanup_errors=True) as folder:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config.model_dump_json(exclude_unset=True), "relay": relay},
            torch_config=TorchConfig(backend="nccl" if ray_config.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=ray_config.num_workers, use_gpu=ray_config.use_gpu, resources_per_worker=per_worker
            ),
            run_config=RunConfig(
                # Ray Train resumes a name it knows; recovery is ours, so every fit has a name of its own.
                name=f"stillroom-{uuid.uuid4().hex[:8]}",
                storage_path=str(Path(folder)),
                failure_config=FailureConfig(max_failures=ray_config.max_failures),
            ),
        )
        with TrainingView() as view, _Watch(relay, view):
            _run(trainer, relay)
    assert config.run is not None
    summary = read_summary(config.run.url)
    assert summary is not None, "a training that ended without error has written its summary"
    return summary


def _run(trainer: TorchTrainer, relay: Any) -> None:
    try:
        _in_thread(trainer.fit)
    except TrainingFailedError as error:
        told = ray.get(relay.error.remote())
        if told is not None:
            raise told from None
        raise TrainingError(
            "training failed",
            got=_cause(error),
            next_step="run the command again: it goes on from the last checkpoint; ray.max_failures restarts by itself",
        ) from error


def _in_thread(work: Callable[[], object]) -> None:
    """Runs work beside the main thread, where Ray Train would take over Ctrl-C and keep it after its end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
    if errors:
        raise errors[0]


def _cause(error: TrainingFailedError) -> str:
    """The first worker's own exception, or the controller's, in one line."""
    failures = getattr(error, "worker_failures", {})
    rank, failure = next(iter(failures.items()), ("controller", error))
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return f"rank {rank}: {lines[-1] if lines else type(failure).__name__}"


class _Watch:
    """Shows the workers' events while ``fit`` blocks."""

    def __init__(self, relay: Any, view: TrainingView) -> None:
        self._relay, self._view = relay, view
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._show()
        self._show()

    def _show(self) -> None:
        for event in ray.get(self._relay.drain.remote()):
            self._view.show(event)


def describe(summary: dict[str, Any]) -> str:
    """One line for the end of a training."""
    top1 = "" if summary["top1"] is None else f", top-1 {summary['top1']:.2%}"
    return f"{summary['steps']} steps in {summary['seconds']:.1f} s{top1}"


def main(source: str, overrides: list[str]) -> None:
    print(f"train: {describe(train_student(load_config(source, overrides)))}", file=sys.stderr)


if __name__ == "__main__":
    config_command("train_student", main)
