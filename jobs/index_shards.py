"""Index shards without a teacher: all that online training needs. ``python -m jobs.index_shards CONFIG [k.k=v …]``."""

from __future__ import annotations

from functools import partial

from jobs.entry import config_command
from jobs.observability.log import emit, warn, warn_of_omissions
from jobs.observability.progress import ProgressView
from jobs.paths import with_absolute_paths
from jobs.ray.cluster import cpus_only
from jobs.ray.fan_out import fan_out
from pipeline import storage
from pipeline.core.config_loading import require
from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.shards.labels import (
    LabelCount,
    check_label_member,
    count_labels,
    domain_warning,
    evenly_spaced,
    label_warning,
)
from pipeline.shards.omissions import Omissions
from pipeline.shards.publish import index_name, publish_shard_index, read_index
from pipeline.shards.shard_head import ShardHead, read_shard_head
from pipeline.shards.shard_urls import report_moved, urls_by_id
from pipeline.storage.config_files import load_config
from pipeline.student.data.sources import index_url
from pipeline.tasks import task_of
from schemas.config import Config, DataConfig

_NUM_SAMPLED = 8


def index_shards(config: Config, folder_url: str) -> int:
    """Writes ``<folder_url>/<shard_id>.parquet`` for every shard without an index. Returns the number of ok rows.

    Raises:
        ShardError: a shard is damaged, has a bad sample under ``bad_samples: fail``, or changed since it was indexed;
            or a shard has no member ``data.image``, or no sample the member ``data.label``.
        StorageInputError: shards are missing.
    """
    require(config, "data.shards", command="shards index")
    assert config.data.shards is not None
    by_id = urls_by_id(config.data.shards)
    storage.check_names(folder_url, map(index_name, by_id))
    with report_moved([*by_id.values()], "append data.shards={}"):
        return _index(by_id, config, folder_url)


def _index(by_id: dict[str, str], config: Config, folder_url: str) -> int:
    _check_members(by_id, config.data, folder_url)
    # Every task reads the config, and a list of 100,000 URLs takes megabytes.
    data = config.data.model_copy(update={"shards": None, "val_shards": None})
    work = partial(publish_shard_index, data=data, folder_url=folder_url, threads=config.ray.cpus_per_task)
    num_ok, omissions = 0, list[Omissions]()
    with ProgressView("index", len(by_id)) as progress:
        indexed = fan_out(work, [*by_id.values()], cpus_only(config.ray), what="an index task", name=redact)
        for done, (_, index) in enumerate(indexed, start=1):
            num_ok += index.num_ok
            omissions.append(index.omissions)
            progress.update(done, f"{num_ok} rows")
    warn_of_omissions("index", omissions)
    labels = count_labels([*by_id], lambda shard: read_index(storage.join(folder_url, index_name(shard))))
    for warning in filter(None, (label_warning(labels, config.data), domain_warning(labels, config.data))):
        warn(f"index: {warning}")
    return num_ok


def _check_members(by_id: dict[str, str], data: DataConfig, folder_url: str) -> None:
    """Detects a wrong ``data.image`` or ``data.label`` before the first shard is indexed: no index is ever replaced.

    Raises:
        ShardError: a sampled shard has no image, or none has the member of the label.
    """
    if not {index_name(shard) for shard in by_id}.isdisjoint(storage.listing(folder_url)):
        return
    sampled = evenly_spaced([*by_id.values()], _NUM_SAMPLED)
    heads: list[ShardHead] = []
    for url in sampled:
        try:
            heads.append(read_shard_head(url, data, size_bytes=storage.size(url)))
        except ShardError as error:
            # Indexing reports other damage.
            if error.code == "shard.no-samples":
                raise
    if task_of(data).members:
        check_label_member(LabelCount.of_heads(heads, data), data, where=redact(sampled[0]))


def main(source: str, overrides: list[str]) -> None:
    config = with_absolute_paths(load_config(source, overrides))
    if config.data.index is None:
        require(config, "run.url", command="shards index without data.index")
    url = index_url(config)
    num_ok = index_shards(config, url)
    emit(f"index: {num_ok} rows in {url}", event="end")


if __name__ == "__main__":
    config_command("index_shards", main)
