"""Runs, datasets and damaged caches for tests of training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline import storage
from pipeline.cache.build.commit import publish_file
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.build.part_writer import PartWriter, view_ranges
from pipeline.cache.format import layout
from pipeline.cache.read.reader import open_cache
from pipeline.core.hashing import seal
from pipeline.models import load_model
from pipeline.shards.publish import publish_shard_index
from pipeline.student.data import order
from pipeline.student.data.batch import InputSize
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.order import TrainingOrder
from pipeline.student.data.sources import CachedSource, IndexedSource, RowSource, open_cached, open_indexed
from pipeline.student.data.teacher_outputs import Reads
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.evaluation.loaded_run import CheckpointName
from pipeline.student.evaluation.metrics import Evaluation
from pipeline.student.run import checkpoint
from pipeline.student.training.run_log import Report, RunLog
from pipeline.student.training.setup import prepare
from pipeline.student.training.trainer import Trainer, train
from pipeline.student.training.validator import Validator
from schemas.config import Config, DataConfig, TrainConfig, ViewsConfig, height_width
from tests.pipeline.caches import TinyCache, read_commits, shard_urls
from tests.tolerances import magnitude_of, network_operations, reordered

SMALL: dict[str, Any] = {
    "model": "python:tests.pipeline.student.small_networks:Small",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
NORMALISED = {**SMALL, "model": "python:tests.pipeline.student.small_networks:Normalised"}
KD = [{"name": "kd", "temperature": 1.0}]
CE = [{"name": "ce"}]
ALL_TERMS = [*CE, {"name": "kd", "temperature": 2.0, "warmup_epochs": 2}, {"name": "dist"}, {"name": "nd"}]
READS: Reads = {"logits": (1.0,)}
Event = dict[str, Any]

_opened: list[RowSource] = []
_seeds = count(1)


class ProcessKilledError(Exception):
    """Ends a training like the death of its process."""


def close_sources() -> None:
    """Closes every source that was opened here; called after each test."""
    while _opened:
        _opened.pop().close()


def run_config(base: Config, url: Path, *, mode: str = "cache", **sections: Any) -> Config:
    """A training of ``Small`` by the shards, teacher and views of ``base``, batches of 8 of every row; sections are
    merged key by key over that."""
    tree = base.model_dump(mode="json", exclude_unset=True)
    cache = tree.pop("cache", None)
    defaults: dict[str, Any] = {
        "data": {"cache": cache["url"]} if mode == "cache" and cache else {},
        "teacher": {"mode": mode},
        "student": SMALL,
        "loss": KD,
        "train": {"epochs": 2, "global_batch_size": 8, "tail": "short", "lr": 3e-3, "schedule": "constant"},
        "run": {"url": str(url)},
    }
    for part in (defaults, sections):
        for section, keys in part.items():
            tree[section] = {**tree.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return Config.model_validate(tree)


def training_error(config: Config, num_steps: float) -> float:
    """The relative distance of two trainings by this config whose sums have other orders: of losses and weights."""
    assert config.student is not None
    loaded = load_model(config.student, widths={"logits": 10}, size=config.views.size, where="student")
    images_BCHW = torch.zeros(config.train.global_batch_size, 3, *height_width(loaded.input.size))
    return reordered(num_steps * network_operations(loaded.module, images_BCHW))


def assert_weights_close(actual: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    """``error`` is relative to the largest weight of each tensor."""
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=error * magnitude_of(value))


def index_shards(config: Config, folder: Path) -> None:
    for url in shard_urls(config).values():
        publish_shard_index(url, data=config.data, folder_url=str(folder), threads=1)


def indexed_source(config: Config, folder: Path) -> IndexedSource:
    index_shards(config, folder)
    source = open_indexed(str(folder), config.data, config.views)
    _opened.append(source)
    return source


def cached_source(
    cache: TinyCache, *others: TinyCache, data: DataConfig | None = None, reads: Reads = READS
) -> CachedSource:
    caches = [open_cache(opened.url) for opened in (cache, *others)]
    source = open_cached(caches, cache.config.data if data is None else data, reads=reads)
    _opened.append(source)
    return source


def order_of(source: RowSource, plan: ViewsConfig, **changes: Any) -> TrainingOrder:
    train = TrainConfig.model_validate({"global_batch_size": 8, "tail": "short", **changes})
    return order.order_of(train, source.shard_ids, source.num_ok, plan, num_views=source.num_views)


def dataset(source: RowSource, plan: ViewsConfig, train: dict[str, Any] | None = None, **changes: Any) -> StepDataset:
    """One rank's batches of 8 rows at 16 pixels, unless changed."""
    keys: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "student": InputSize(16, "bilinear"),
        "max_pixels": 10**6,
    }
    return StepDataset(source, order_of(source, plan, **(train or {})), **{**keys, **changes})


def trainer_of(
    config: Config, distributed: DistributedContext | None = None, report: Report = lambda _: None
) -> Trainer:
    """The trainer of a run that is not claimed, and whose validation samples are not read. Close its setup."""
    distributed = distributed or DistributedContext()
    setup = prepare(config, distributed)
    log = RunLog(setup.run_url, distributed, report)
    return Trainer(setup, Validator(setup, log.emit), log)


def train_until(config: Config, is_last: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The events of a training that is interrupted at the first event of which ``is_last`` is true."""
    events: list[dict[str, Any]] = []

    def report(event: dict[str, Any]) -> None:
        events.append(event)
        if is_last(event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, report=report)
    return events


def run(config: Config, *, stop: tuple[str, int] | None = None) -> list[Event]:
    """Trains; with ``stop`` the process dies at the n-th event of that kind. Returns what was reported.

    The global seed of torch differs in each call, and must have no effect.
    """
    assert config.run is not None
    if config.teacher.mode != "cache":
        index_shards(config, Path(config.run.url) / "index")
    torch.manual_seed(next(_seeds))
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if stop is not None and sum(earlier["kind"] == stop[0] for earlier in events) == stop[1]:
            raise ProcessKilledError

    with nullcontext() if stop is None else pytest.raises(ProcessKilledError):
        train(config, report=report)
    return events


def warnings_of(config: Config) -> list[str]:
    """Trains; the texts of the warnings that it reports."""
    events: list[dict[str, Any]] = []
    train(config, report=events.append)
    return [event["text"] for event in events if event["kind"] == "warning"]


def state_of(run_url: Path | str, name: str = checkpoint.LAST) -> dict[str, Any]:
    """A checkpoint of a run."""
    state = checkpoint.load(str(run_url), name)
    assert state is not None
    return state


def summary_of(run_url: Path | str) -> dict[str, Any]:
    """The summary of a finished run."""
    summary = checkpoint.read_summary(str(run_url))
    assert summary is not None
    return summary


def resumed_at(events: list[Event]) -> int:
    return next(event["first_step"] for event in events if event["kind"] == "begin")


def check_resume(config_of: Callable[[Path], Config], folder: Path, *, stop: tuple[str, int], first_step: int) -> None:
    """A run whose process dies at the n-th event of a kind, and which resumes at this step, ends with the same bits as
    an undisturbed one. It needs validation shards."""
    straight, stopped = folder / "straight", folder / "stopped"
    run(config_of(straight))
    run(config_of(stopped), stop=stop)
    assert checkpoint.read_summary(str(stopped)) is None
    assert resumed_at(run(config_of(stopped))) == first_step
    for name in (checkpoint.LAST, checkpoint.BEST):
        assert_bitwise(state_of(straight, name), state_of(stopped, name))
    assert metrics(stopped) == metrics(straight)
    assert evaluations(stopped) == evaluations(straight)


def assert_bitwise(actual: Any, expected: Any, path: str = "") -> None:
    """Equal contents of checkpoints or summaries, but for their ``seconds``."""
    if isinstance(actual, Tensor):
        assert torch.equal(actual, expected), path
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys(), path
        for key in actual.keys() - {"seconds"}:
            assert_bitwise(actual[key], expected[key], f"{path}/{key}")
    elif isinstance(actual, list):
        for number, items in enumerate(zip(actual, expected, strict=True)):
            assert_bitwise(*items, f"{path}/{number}")
    else:
        assert actual == expected, path


def evaluations(run_url: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_url / checkpoint.EVALUATIONS).read_text().splitlines()]


def evaluated(config: Config, name: CheckpointName = "last", *, with_teacher: bool = True) -> Evaluation:
    """Of a finished run, on the validation shards of its config."""
    assert config.run is not None
    assert config.data.val_shards is not None
    return evaluate_run(
        config.run.url,
        config.data.val_shards,
        checkpoint_name=name,
        num_threads=1,
        device=torch.device("cpu"),
        with_teacher=with_teacher,
    )


def metrics(run_url: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_url / "metrics.jsonl").read_text().splitlines()]


def losses(run_url: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_url)]


def rewrite_view(cache: TinyCache, shard_id: str, view: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replaces the rows of one view in its part, and updates every digest, commit and table: only a check of the rows
    themselves can detect it."""
    commit = next(
        commit
        for commit in read_commits(cache.url)
        if commit.shard_id == shard_id and not commit.block.is_eval and view in commit.block.views
    )
    whole = pq.read_table(storage.join(cache.url, commit.part.path))
    views = {number: whole.filter(pc.equal(whole["view"], number)) for number in commit.block.views}
    views[view] = change(views[view])
    with tempfile.TemporaryDirectory() as folder:
        with PartWriter(Path(folder), list(views), views[view].schema, row_size_bytes=64) as writer:
            for number, table in views.items():
                for batch in table.combine_chunks().to_batches():
                    writer.add(number, batch)
            part = writer.close()
        ranges, footer = view_ranges(part, {number: table.num_rows for number, table in views.items()})
        ref = publish_file(cache.url, part, layout.part_path(shard_id, commit.block))
    changed = commit.model_copy(update={"part": ref, "views": ranges, "footer": footer})
    url = storage.join(cache.url, layout.commit_path(shard_id, commit.block))
    storage.write(url, seal(changed.model_dump(mode="json")))
    publish_manifest(cache.url, shard_urls(cache.config))


def set_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def set_cell(name: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    """A change of one cell, for ``rewrite_view``; ``value`` may be a function of the old one."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        return set_column(table, name, values)

    return change
