"""Train a student with DDP under Ray Train. ``python -m jobs.train_student CONFIG [k.k=v …]``."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, TrainingFailedError, get_context
from ray.train.torch import TorchConfig, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.entry import config_command
from jobs.index_shards import index_shards
from jobs.observability.log import emit, warn
from jobs.observability.training_observer import TrainingObserver
from jobs.paths import with_absolute_paths
from jobs.ray.cluster import cluster, node_name, require_resources
from jobs.ray.train_internals import RayTrainer, preemption_pending
from jobs.ray.worker_group import PlacementMonitor, min_workers, scaling_config, worker_keys, worker_resources
from pipeline import storage
from pipeline.core.errors import ConfigError, InputError, StillroomError, TrainingError
from pipeline.core.temporary import temporary_folder
from pipeline.storage.config_files import load_config
from pipeline.student.data.sources import index_url
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics import metrics_of
from pipeline.student.run.checkpoint import check_same_config, read_summary
from pipeline.student.training.config_checks import check_config, check_training
from pipeline.student.training.trainer import train
from schemas.config import Config

_POLL_S = 0.5


def train_student(config: Config, *, device: torch.device | None = None) -> dict[str, Any]:
    """Trains to the end, from the run's last checkpoint if there is one, and returns the run's summary. First indexes
    the shards of a run without a cache.

    Args:
        device: for a training without Ray; None: the CPU.

    Raises:
        StillroomError: bad input, too few resources, or a failed training.
    """
    config = with_absolute_paths(config)
    run_url = check_config(config)
    check_same_config(run_url, config)
    if (summary := read_summary(run_url)) is not None:
        emit(f"train {storage.last_name(run_url)}: finished earlier; nothing to do", event="end")
        return summary
    for warning in check_training(config):
        warn(f"train: {warning}")
    storage.probe(run_url)
    if config.ray.address == "none":
        return _train_in_process(config, DistributedContext() if device is None else DistributedContext(device=device))
    with cluster(config.ray):
        _ensure_index(config)
        return _fit(config)


def _train_in_process(config: Config, distributed: DistributedContext) -> dict[str, Any]:
    """One process, no Ray."""
    if config.ray.num_workers > 1 or config.ray.use_gpu:
        raise ConfigError(
            "several workers or GPUs need Ray",
            code="ray.workers-without-ray",
            where="ray.address",
            got=f"none, with num_workers={config.ray.num_workers}, use_gpu={config.ray.use_gpu}",
            next_step="set ray.address=local, or ray.num_workers=1 and ray.use_gpu=false",
        )
    _ensure_index(config)
    with TrainingObserver(config) as observer:
        observer.observe({"kind": "rank", "rank": 0, "world_size": 1, "node": node_name()})
        return train(config, distributed, observer.observe)


def _ensure_index(config: Config) -> None:
    if config.teacher.mode != "cache":
        index_shards(config, index_url(config))


@ray.remote(num_cpus=0)
class EventActor:
    """Carries the workers' events to the driver, and the error that explains a failure."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._error: StillroomError | None = None

    def push(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events

    def fail(self, error: StillroomError) -> None:
        # The other ranks then fail because they lost their peer.
        self._error = self._error or error

    def error(self) -> StillroomError | None:
        return self._error

    def begin(self) -> StillroomError | None:
        """Called by each worker of a new or restarted group. Returns an input error, which a restart cannot fix."""
        if self._error is not None and self._error.exit_code != InputError.exit_code:
            self._error = None
        return self._error


def _call(method: Any, *arguments: Any) -> Any:
    """Calls a method of the event actor and waits for its result."""
    return ray.get(method.remote(*arguments))


def _worker(arguments: dict[str, Any]) -> None:
    """One DDP rank, in a process that Ray Train started."""
    event_actor = arguments["event_actor"]
    if (fatal := _call(event_actor.begin)) is not None:
        raise fatal
    context = get_context()
    distributed = DistributedContext(
        context.get_world_rank(), context.get_world_size(), get_device(), preemption_pending
    )
    rank = {"kind": "rank", "rank": distributed.rank, "world_size": distributed.size, "node": node_name()}
    # Waits, so that every rank is registered with the driver before the first step.
    _call(event_actor.push, rank)
    config = Config.model_validate_json(ray.get(arguments["config"]))
    try:
        train(config, distributed, report=lambda event: event_actor.push.remote(event))
    except StillroomError as error:
        _call(event_actor.fail, error)
        raise


def _fit(config: Config) -> dict[str, Any]:
    assert config.run is not None
    ray_config = config.ray
    require_resources(
        worker_resources(ray_config),
        num=min_workers(ray_config),
        wait_s=ray_config.wait_s,
        what=f"training with {min_workers(ray_config)} workers",
        where=worker_keys(ray_config),
    )
    event_actor = _event_actor_on_this_node()
    with temporary_folder("stillroom-train-") as folder, TrainingObserver(config) as observer:
        fit_with_restarts(
            lambda: _trainer(config, event_actor, Path(folder)),
            event_actor,
            observer.observe,
            max_failures=ray_config.max_failures,
        )
    summary = read_summary(config.run.url)
    assert summary is not None, "a training that ended without error has written its summary"
    return summary


def _event_actor_on_this_node() -> Any:
    """On the driver's node, since any other node may be preempted."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return EventActor.options(scheduling_strategy=this_node).remote()


def _trainer(config: Config, event_actor: Any, folder: Path) -> RayTrainer:
    assert config.run is not None
    run_url = config.run.url

    def push_warning(text: str) -> None:
        event_actor.push.remote({"kind": "warning", "run": run_url, "text": text})

    return RayTrainer(
        _worker,
        # A reference: Ray Train may show these values, and URLs of a config may contain credentials.
        train_loop_config={"config": ray.put(config.model_dump_json(exclude_unset=True)), "event_actor": event_actor},
        torch_config=TorchConfig(backend="nccl" if config.ray.use_gpu else "gloo"),
        scaling_config=scaling_config(config.ray),
        run_config=RunConfig(
            # A new name for every fit: Ray Train would resume a run of the same name from its own checkpoints.
            name=f"stillroom-{uuid.uuid4().hex[:8]}",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=config.ray.max_failures),
            # Typed for the callbacks of Ray Train's public interface.
            callbacks=cast("list[Any]", [PlacementMonitor(config.ray, push_warning)]),
        ),
    )


def fit_with_restarts(
    trainer: Callable[[], RayTrainer],
    event_actor: Any,
    observe: Callable[[dict[str, Any]], None],
    *,
    max_failures: int,
) -> None:
    """Fits to the end. Ray Train restarts lost workers, but ends with a ``ControllerError`` where it loses them while
    they start; they are restarted here.

    Args:
        observe: called with each event of the workers.

    Raises:
        StillroomError: the training failed more than ``max_failures`` times, or failed on its input.
    """

    def poll() -> None:
        for event in _call(event_actor.drain):
            observe(event)

    failures = 0
    while True:
        try:
            _fit_in_thread(trainer(), poll)
            break
        except TrainingFailedError as error:
            failure = error.controller_failure if isinstance(error, ControllerError) else None
            if isinstance(failure, StillroomError):
                raise failure from None
            failures += 1
            if not isinstance(failure, RayActorError) or failures > max_failures:
                raise _explained(error, event_actor) from error


def _explained(error: TrainingFailedError, event_actor: Any) -> StillroomError:
    """The error of a rank, or that of a killed worker, or else the first exception of any worker."""
    return (
        _call(event_actor.error)
        or _killed(error)
        or TrainingError(
            "training failed",
            code="train.failed",
            got=_first_exception(error),
            next_step="run the command again: it resumes from the last checkpoint; ray.max_failures restarts it "
            "automatically",
        )
    )


def _killed(error: TrainingFailedError) -> TrainingError | None:
    """The error for a worker process that ended without an exception, whatever exceptions its peers then raised; None
    where all workers raised exceptions.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    # Ray Train wraps the error of a dead actor in one of its health checks.
    causes = {rank: getattr(failure, "health_check_failure", failure) for rank, failure in failures.items()}
    # Ray's memory monitor also kills actors.
    dead = {rank: cause for rank, cause in causes.items() if isinstance(cause, RayActorError | OutOfMemoryError)}
    if not dead:
        return None
    return TrainingError(
        "a worker process of the training died",
        code="train.worker-killed",
        where=f"rank {', '.join(map(str, sorted(dead)))}",
        got=_termination_cause(str(next(iter(dead.values())))),
        next_step="SIGKILL or out of memory: more memory a worker, or a smaller train.global_batch_size; SIGBUS: more "
        "/dev/shm, or train.num_workers=0; SIGSEGV or SIGABRT: a crash in native code, on a CPU try "
        "train.channels_last=false; then (or after a lost node) run the command again: it resumes from the last "
        "checkpoint",
    )


def _termination_cause(report: str) -> str:
    """The signals that Ray's report of a dead actor names, or else its sentences without the fields of the actor. Ray
    lists several candidates where it does not know the signal.
    """
    if signals := dict.fromkeys(re.findall(r"SIG[A-Z]+", report)):
        return f"one of {', '.join(signals)} (Ray's report)"
    return " ".join(line.strip() for line in report.splitlines() if line.strip() and not line.startswith("\t"))


def _fit_in_thread(trainer: RayTrainer, poll: Callable[[], None]) -> None:
    """Fits outside the main thread, where Ray Train would replace the handler of Ctrl-C and not restore it."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_S)
            poll()
    except KeyboardInterrupt:
        poll()
        raise
    if errors:
        raise errors[0]


def _first_exception(error: TrainingFailedError) -> str:
    """The exception of the first worker, or of the controller, in one line."""
    failures = getattr(error, "worker_failures", {})
    rank, failure = next(iter(failures.items()), ("controller", error))
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return f"rank {rank}: {lines[-1] if lines else type(failure).__name__}"


def describe(summary: dict[str, Any], config: Config) -> str:
    """One line for the end of a training."""
    metrics = metrics_of(config.data, config.train.best)
    score = metrics.score(summary)
    measured = "" if score is None else f", {metrics.text(score)}"
    return f"{summary['steps']} steps in {summary['seconds']:.1f} s{measured}"


def main(source: str, overrides: list[str]) -> None:
    config = load_config(source, overrides)
    emit(f"train: {describe(train_student(config), config)}", event="end")


if __name__ == "__main__":
    config_command("train_student", main)
