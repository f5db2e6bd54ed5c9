"""Changes to a cache that no digest reveals: files are written again, and all records that name them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.cache.build.commit import publish_file
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.build.part_writer import PartWriter, view_ranges
from pipeline.cache.format import layout
from pipeline.core.hashing import seal
from schemas.cache_format import Commit
from tests.pipeline.caches import TinyCache, read_commits, shard_urls


def commit_of(cache: TinyCache, shard: str, block: str) -> Commit:
    return next(item for item in read_commits(cache.url) if (item.shard_id, item.block.name) == (shard, block))


def replace_commit(cache: TinyCache, commit: Commit) -> None:
    """Writes a commit under the name of its block, with its digest."""
    url = storage.join(cache.url, layout.commit_path(commit.shard_id, commit.block))
    storage.write(url, seal(commit.model_dump(mode="json")))


def republish(cache: TinyCache) -> None:
    """Publishes the tables, class means and manifest of the current commits, and removes files that none names."""
    publish_manifest(cache.url, shard_urls(cache.config))


def rewrite_part(cache: TinyCache, commit: Commit, change: Callable[[pa.Table], pa.Table]) -> Commit:
    """Publishes a part with changed content under the correct name, and the commit that names it."""
    table = change(pq.read_table(storage.join(cache.url, commit.part.path)))
    with tempfile.TemporaryDirectory() as folder:
        views = [view.view for view in commit.views]
        with PartWriter(Path(folder), views, table.schema, row_size_bytes=1 << 17) as writer:
            for view in views:
                rows = table.filter(pc.equal(table["view"], view))  # pyright: ignore[reportAttributeAccessIssue]
                for batch in rows.to_batches():
                    writer.add(view, batch)
            local = writer.close()
        ranges, footer = view_ranges(local, {view.view: view.rows for view in commit.views})
        part = publish_file(cache.url, local, layout.part_path(commit.shard_id, commit.block))
    forged = commit.model_copy(update={"part": part, "views": ranges, "footer": footer})
    replace_commit(cache, forged)
    return forged


def set_cell(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    """The table with one cell changed."""
    values = table[name].to_pylist()
    values[row] = value
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
