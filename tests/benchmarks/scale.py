"""The work of a build's driver and of a training rank per shard, for a synthetic cache of many shards.

Commits are those a build would write (sealed, five views, one row for every class), written without its fsyncs; their
parts are empty files, since no stage here opens one. ``python -m tests.benchmarks.scale 100000`` takes another size;
``python -m tests.benchmarks.scale order 100000 10000 64`` builds an epoch of so many shards of so many rows, for one
of so many ranks.
"""

from __future__ import annotations

import gc
import hashlib
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from jobs.build_cache import check_shards, plan_tasks
from pipeline import storage
from pipeline.cache.build.commit import files_present, read_commit_summaries
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.build.part import PartTask
from pipeline.cache.format import layout
from pipeline.cache.read.reader import open_cache
from pipeline.core.hashing import seal
from pipeline.shards.shard_urls import shard_ids
from pipeline.student.data.order import order_of
from pipeline.teacher.numerics import numeric_env
from schemas.cache_format import ByteRange, Commit, FileRef, Header, Output, RowField, Statistics, ViewBlock, ViewRange
from schemas.config import Config, TrainConfig, ViewsConfig

_SIZES = (1_000, 10_000)
_VIEWS, _ROWS, _CLASSES = 5, 1_000, 1_000
T = TypeVar("T")


def _sha(*names: object) -> str:
    return hashlib.sha256(repr(names).encode()).hexdigest()


def _header() -> Header:
    field = RowField(name="values", dtype="<f2", count=_CLASSES)
    logits = Output(name="logits", shape=(_CLASSES,), dtype="<f2", encoding="dense", fields=(field,))
    return Header(
        views_id="v",
        views={"kind": "crop", "rng_version": 1},
        fingerprint="f",
        teacher={"precision": "fp32", "class_means": "none"},
        data={},
        num_classes=_CLASSES,
        embedding_dim=2048,
        outputs=(logits,),
        probe_logits=((0.0,),),
    )


def _commit(shard: str, size_bytes: int) -> Commit:
    block = ViewBlock(start=0, stop=_VIEWS)
    sha = _sha(shard, "part")
    view_bytes = _ROWS * 2_100
    views = tuple(
        ViewRange(view=view, offset=4 + view * view_bytes, size_bytes=view_bytes, rows=_ROWS, digest=_sha(shard, view))
        for view in block.views
    )
    # A thousand samples among a thousand classes cover 632 of them.
    counts = {number * _CLASSES // 632: _VIEWS for number in range(632)}
    return Commit(
        fingerprint="f",
        shard_id=shard,
        shard_size_bytes=size_bytes,
        block=block,
        part=FileRef(
            path=layout.part_path(shard, block).replace("{sha16}", sha[:16]), sha256=sha, size_bytes=_VIEWS * view_bytes
        ),
        index=FileRef(path=layout.index_path(shard), sha256=_sha(shard, "index"), size_bytes=50_000),
        means=None,
        num_ok=_ROWS,
        read=_ROWS,
        written=_ROWS,
        skipped={},
        views=views,
        footer=ByteRange(offset=4 + _VIEWS * view_bytes, size_bytes=9_000, digest=_sha(shard, "footer")),
        statistics=Statistics(
            labelled=_VIEWS * _ROWS,
            top1_hits=4_000,
            top5_hits=4_800,
            class_counts=counts,
            fidelity_rows=80,
            kl_sum={"1.0": 0.01, "2.0": 0.01, "4.0": 0.01},
            pearson_sum={"1.0": 0.01, "2.0": 0.01, "4.0": 0.01},
        ),
        environment=numeric_env(torch.device("cpu"), batch_size=256),
    )


def make_cache(folder: Path, num_shards: int) -> Config:
    """Empty shards, and a cache with a commit, an index and a part for each, but no manifest."""
    cache = folder / "cache"
    pattern = f"{folder}/shards/train-{{000000..{num_shards - 1:06d}}}.tar"
    for name in ("shards", "cache/index"):
        (folder / name).mkdir(parents=True)
    (cache / layout.HEADER).write_bytes(seal(_header().model_dump(mode="json")))
    for url in storage.expand(pattern):
        path = Path(url)
        path.touch()
        commit = _commit(path.stem, 0)
        for name in (commit.part.path, commit.index.path, layout.commit_path(path.stem, commit.block)):
            target = cache / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        target.write_bytes(seal(commit.model_dump(mode="json")))
    return Config.model_validate(
        {
            "data": {"shards": pattern, "num_classes": _CLASSES},
            "teacher": {"model": "timm/resnet50", "weights": "random"},
            "views": {"count": _VIEWS, "size": 224},
            "cache": {"url": str(cache), "views_per_part": _VIEWS},
        }
    )


def _stage(name: str, work: Callable[[], T]) -> T:
    """Seconds, and by how much the memory of this process grew."""
    gc.collect()
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    print(f"  {name:<34}{seconds:9.2f} s {(process.memory_info().rss - before) / 1e6:10.1f} MB")
    return result


def report(num_shards: int) -> None:
    """One table."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_cache(Path(folder), num_shards)
        print(f"  {num_shards} shards")
        _build_stages(config)
        assert config.cache is not None
        _training_stages(config.cache.url, config.views)


def _build_stages(config: Config) -> None:
    assert config.data.shards is not None
    assert config.cache is not None
    patterns, url = config.data.shards, config.cache.url
    urls = _stage("names expanded and checked for duplicates", lambda: storage.expand(patterns))
    by_id = dict(zip(_stage("shard ids", lambda: shard_ids(urls)), urls, strict=True))
    commits = _stage("commits read", lambda: read_commit_summaries(url))
    _stage("sizes of shards", lambda: check_shards(url, by_id, commits))
    _stage("parts, sums and indexes listed", lambda: files_present(url))
    tasks = _stage("tasks planned for nothing built", lambda: plan_tasks(config, by_id, []))
    print(f"  {'a task on its way to a worker':<34}{_task_bytes(tasks):9} bytes")
    listed = config.model_copy(update={"data": config.data.model_copy(update={"shards": tuple(urls)})})
    print(f"  {'the same, shards given as a list':<34}{_task_bytes(plan_tasks(listed, by_id, [])):9} bytes")
    _stage("manifest published", lambda: publish_manifest(url, by_id))


def _task_bytes(tasks: list[PartTask]) -> int:
    return len(pickle.dumps(tasks[0]))


def _training_stages(url: str, plan: ViewsConfig) -> None:
    cache = open_cache(url)
    shards = _stage("table of shards read", lambda: cache.shards)
    _stage("table of parts read, one row found", lambda: cache.committed_view(shards[-1].shard_id, 0))
    for name, ref in (("shards", cache.manifest.shards), ("parts", cache.manifest.parts)):
        print(f"  {'table of ' + name:<34}{ref.size_bytes / 1e6:9.1f} MB")
    _order_stages([shard.shard_id for shard in shards], [shard.num_ok for shard in shards], plan, num_ranks=64)


def _order_stages(shard_ids: list[str], num_ok: list[int], plan: ViewsConfig, *, num_ranks: int) -> None:
    order = _stage(
        "order of training",
        lambda: order_of(TrainConfig(global_batch_size=1024, lanes=64), shard_ids, num_ok, plan),
    )
    _stage(f"an epoch of it for one of {num_ranks} ranks", lambda: order.epoch(0, 0).rows(0, 0, num_ranks))


def report_order(num_shards: int, num_rows: int, num_ranks: int) -> None:
    """An epoch of more rows than the synthetic cache has, and the peak memory of this process."""
    print(f"  {num_shards} shards of {num_rows} rows")
    shard_ids = [f"train-{number:06d}" for number in range(num_shards)]
    _order_stages(shard_ids, [num_rows] * num_shards, ViewsConfig(count=_VIEWS, size=224), num_ranks=num_ranks)
    print(f"  {'peak of the process':<47}{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:10.1f} MB")


def run() -> None:
    for num_shards in _SIZES:
        report(num_shards)


if __name__ == "__main__":
    if sys.argv[1] == "order":
        report_order(*map(int, sys.argv[2:]))
    else:
        report(int(sys.argv[1]))
