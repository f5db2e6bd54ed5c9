"""S3 requests of a build and of an epoch of training, for an estimate of their price.

Requests that grow with the number of shards and parts are counted, if nothing fails. All others of the driver are a
constant. ``tests/faults/test_s3_requests.py`` compares the sum with the log of an S3 server.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import storage
from pipeline.cache.plan.plan_inputs import PlanInputs
from pipeline.shards.labels import NUM_INDEXES_READ


@dataclass(frozen=True, slots=True)
class Requests:
    """HEAD counts as get; each chunk of a large object counts as one request."""

    put: int = 0
    get: int = 0
    list: int = 0


# Probe of the store, survey of a few shards, header, log, listings, tables, class means and manifest of a new build.
_DRIVER = Requests(put=8, get=32, list=16)
# The header twice, the commit, the index, and a HEAD of the uploaded part.
_GETS_PER_PART = 5
# The index, the rows of one view, and the footer of their part.
_GETS_PER_VIEW = 3


def build_requests(inputs: PlanInputs, *, row_bytes: float, num_objects: int) -> Requests:
    """Requests of the parts that are still to build, and of the driver.

    Args:
        row_bytes: expected bytes of a row in a part.
        num_objects: of the finished cache.
    """
    commits, num_shards = inputs.commits, len(inputs.urls)
    num_parts = put = get = 0
    for shard, blocks in inputs.blocks.items():
        num_parts += blocks.num_parts
        get += len(blocks.missing) * (_GETS_PER_PART + _gets_per_fetch(inputs, shard))
        for block in blocks.missing:
            part_bytes = inputs.survey.rows[shard].expected * len(block.views) * row_bytes
            put += storage.num_puts(part_bytes) + 1
    # The first part of a shard writes its index; one part writes its class sums, which get a HEAD.
    put += num_shards - len({commit.shard_id for commit in commits})
    num_sums_open = inputs.num_class_sums - sum(commit.means is not None for commit in commits)
    # At its start the driver reads sizes of shards and commits; at its end every commit and class sum, and indexes to
    # count the labels.
    get += len(commits) + (num_shards if inputs.is_remote and num_shards < storage.NAMES_PER_PAGE else 0)
    get += num_parts + inputs.num_class_sums + min(num_shards, NUM_INDEXES_READ)
    return Requests(
        put=_DRIVER.put + put + num_sums_open,
        get=_DRIVER.get + get + num_sums_open,
        list=_DRIVER.list + num_objects // storage.NAMES_PER_PAGE,
    )


def epoch_requests(inputs: PlanInputs) -> Requests:
    """Requests of the first epoch of a training on one node, at most; later epochs may find shards on its disk.

    A rank fetches ahead, and each of its loader processes opens the shards of its rows. No shard is read where the
    cache stores the views.
    """
    train = inputs.config.train
    num_opens, views = 1 + max(1, train.num_workers), train.views_per_image
    if inputs.config.views.pixels != "none":
        return Requests(get=len(inputs.urls) * views * _GETS_PER_VIEW)
    return Requests(
        get=sum(_gets_per_fetch(inputs, shard, num_opens=num_opens) + views * _GETS_PER_VIEW for shard in inputs.urls)
    )


def _gets_per_fetch(inputs: PlanInputs, shard: str, *, num_opens: int = 1) -> int:
    """A HEAD by each process that opens a remote shard, and the GETs of one download."""
    is_remote = storage.protocol(inputs.urls[shard]) != "file"
    return num_opens + storage.num_gets(inputs.sizes[shard]) if is_remote else 0
