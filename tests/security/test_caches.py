"""A malicious cache, with valid digests and false paths."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.cache.build.commit import revoke
from pipeline.cache.format import layout
from pipeline.cache.ops.gc import collect_garbage
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import CacheError, InputError
from pipeline.core.hashing import digest, seal
from pipeline.student.training.trainer import train
from schemas.config import TeacherConfig
from tests.errors import raises
from tests.pipeline.caches import TinyCache, read_commits
from tests.pipeline.student.runs import run_config

SHA = "0" * 64


def change_record(path: Path, **changes: object) -> None:
    """Changes the content and the digest."""
    body = json.loads(path.read_bytes())
    path.write_bytes(seal({**body, **changes}))


def change_table(cache: TinyCache, name: str, column: str, change: Callable[[str], str]) -> None:
    """Changes one column of a table of the manifest, and the manifest."""
    path = Path(cache.url, f"manifest/{name}.parquet")
    table = pq.read_table(path, use_threads=False)
    values = pa.array([change(value) for value in table[column].to_pylist()], pa.string())
    sink = io.BytesIO()
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, values), sink)
    path.write_bytes(sink.getvalue())
    ref = {"path": f"manifest/{name}.parquet", "sha256": digest(sink.getvalue()), "size_bytes": sink.tell()}
    change_record(Path(cache.url, layout.MANIFEST), **{name: ref})


def read_everything(url: str) -> None:
    cache = open_cache(url)
    for shard in cache.shards:
        cache.index(shard)
        cache.view(shard.shard_id, 0)


@pytest.mark.parametrize(("table", "column"), [("parts", "path"), ("shards", "shard_id")])
def test_no_table_leads_a_reader_out_of_the_cache(tiny_cache: TinyCache, table: str, column: str) -> None:
    change_table(tiny_cache, table, column, lambda value: f"x/../../{value}")
    with raises("storage.path-outside-folder", InputError):
        read_everything(tiny_cache.url)


@pytest.mark.parametrize("path", ["../outside.parquet", "manifest/../../outside.parquet"])
def test_no_manifest_leads_a_reader_out_of_the_cache(tiny_cache: TinyCache, path: str) -> None:
    outside = Path(tiny_cache.url).parent / "outside.parquet"
    outside.write_bytes(Path(tiny_cache.url, layout.SHARDS).read_bytes())
    ref = {"path": path, "sha256": digest(outside.read_bytes()), "size_bytes": outside.stat().st_size}
    change_record(Path(tiny_cache.url, layout.MANIFEST), shards=ref)
    with raises("storage.path-outside-folder", InputError):
        read_everything(tiny_cache.url)


def test_no_commit_leads_a_builder_or_gc_to_remove_files_outside_of_the_cache(tiny_cache: TinyCache) -> None:
    (commit_path, *_) = sorted(Path(tiny_cache.url, "commits/digits-00").iterdir())
    outside = Path(tiny_cache.url).parent / "mine" / commit_path.name
    outside.parent.mkdir()
    outside.write_text("mine")
    part = {"path": f"../mine/{commit_path.name}", "sha256": SHA, "size_bytes": 4}
    change_record(commit_path, shard_id="../../mine", part=part)
    commits = [commit for commit in read_commits(tiny_cache.url) if commit.shard_id == "../../mine"]
    assert len(commits) == 1
    with raises("storage.path-outside-folder", InputError):
        revoke(tiny_cache.url, commits)
    collect_garbage(tiny_cache.url, min_age_s=0, former=True)
    assert outside.read_text() == "mine"


@pytest.mark.parametrize(
    "base", ["pipe:touch {target}", "pipe://touch {target}", "simplecache::file://{target}", "ftp://h"]
)
def test_no_base_url_of_a_cache_runs_a_command(tiny_cache: TinyCache, base: str, tmp_path: Path) -> None:
    target = tmp_path / "created"
    change_record(Path(tiny_cache.url, layout.MANIFEST), base=base.format(target=target))
    cache = open_cache(tiny_cache.url)
    with raises("storage.refused-url", InputError):
        storage.size(cache.shard_url(cache.shards[0]))
    assert not target.exists()


def test_no_module_named_by_a_cache_is_imported(
    tiny_cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_by_a_cache.py").write_text("def build(num_classes): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    header = json.loads(Path(tiny_cache.url, layout.HEADER).read_bytes())
    teacher = {**header["teacher"], "architecture": {"model": "python:planted_by_a_cache:build"}}
    change_record(Path(tiny_cache.url, layout.HEADER), teacher=teacher)
    change_record(
        Path(tiny_cache.url, layout.MANIFEST), header_sha256=digest(Path(tiny_cache.url, layout.HEADER).read_bytes())
    )
    assert open_cache(tiny_cache.url).header.teacher["architecture"]["model"] == "python:planted_by_a_cache:build"
    config = tiny_cache.config.model_copy(update={"teacher": TeacherConfig()})
    assert train(run_config(config, tmp_path / "run", train={"epochs": 1}))["steps"] == 5
    verify_cache(tiny_cache.url)
    assert "planted_by_a_cache" not in sys.modules


def test_a_deeply_nested_record_is_damage_and_no_crash(tiny_cache: TinyCache) -> None:
    Path(tiny_cache.url, layout.MANIFEST).write_bytes(b"[" * 200_000)
    with raises("cache.record-changed", CacheError):
        open_cache(tiny_cache.url)
