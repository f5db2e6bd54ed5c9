"""Costs of the events of one part: logging, counters and metrics, in the driver and in the worker of the part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr

import ray

from jobs.observability.build_observer import BuildObserver
from jobs.observability.log import VARIABLE
from jobs.observability.task_observer import AttemptStats
from pipeline.cache.build.part import PartTask
from schemas.cache_format import ViewBlock
from schemas.config import Config
from tests.benchmarks.timing import Spread, interleaved
from tests.jobs.observability.test_build_observer import built

_PARTS, _ROUNDS = 1_000, 9


def run() -> None:
    config = Config.model_validate({"data": {"shards": "s3://bucket/train.tar"}, "cache": {"url": "s3://bucket/cache"}})
    task = PartTask(config, "s3://bucket/train.tar", ViewBlock(start=0, stop=5))
    observer = BuildObserver(config, [task] * _PARTS * 10 * _ROUNDS, num_shards=1)
    result, spent = built(images=1_000, views=5, size_bytes=1_000_000, busy_s=9.0), AttemptStats("node", 10.0)

    def driver() -> None:
        for _ in range(_PARTS):
            observer.done(task, result, spent, attempt=1)
            observer.note()

    def worker() -> None:
        for _ in range(_PARTS):
            label = observer.label(task, 1)
            label.emit_begin()
            label.emit_end(spent)

    variants = {
        "driver, no Ray": _as("text", driver),
        "worker, plain lines": _as("text", worker),
        "worker, JSON": _as("json", worker),
    }
    _report(variants)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        _report({"driver, metrics": _as("text", driver), "driver, metrics and JSON": _as("json", driver)})
    finally:
        ray.shutdown()


def _as(form: str, work: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        os.environ[VARIABLE] = form
        with tempfile.TemporaryFile("w") as log, redirect_stderr(log):
            work()
        del os.environ[VARIABLE]

    return call


def _report(variants: dict[str, Callable[[], None]]) -> None:
    for name, seconds in interleaved(variants, rounds=_ROUNDS).items():
        print(f"  {name:<26}{Spread.of([value / _PARTS * 1e3 for value in seconds])} ms per part")
