"""What a build would do and cost, before it writes anything: rows, bytes, objects, requests, teacher forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.cache.build.commit import CommitSummary
from pipeline.cache.format.codec import row_bytes, stored_outputs
from pipeline.cache.plan.plan_inputs import PlanInputs, PlannedPixels
from pipeline.cache.plan.s3_requests import Requests, build_requests, epoch_requests
from pipeline.cache.plan.shard_survey import Estimate
from pipeline.shards.labels import LabelCount
from pipeline.tasks import planned_outputs, task_of
from schemas.cache_format import Output, aug_param_columns, part_schema
from schemas.config import Config, ViewsConfig

_CANARY_SHARE = 0.001
# Compression hardly shrinks the low bits of floats, hashes and boxes, which are half of a row and more.
_MIN_COMPRESSED_SHARE = 0.5
# How far the bytes of new rows may differ from those of committed rows.
_MEASURED_SPREAD = 0.1
# The same of JPEGs of a few sampled images.
_SAMPLED_SPREAD = 0.25
_CLASS_SUM_BYTES = 12  # class and count, besides 8 a dimension


@dataclass(frozen=True, slots=True)
class Work:
    """Counts. Names that end in ``open`` count what is not committed yet.

    Attributes:
        rows: usable images.
        num_counted: shards whose rows were counted; those of the others are estimated.
        blocks_per_shard: how often a shard is read and decoded.
        forwards: rows that the teacher computes, the eval pass included.
    """

    rows: Estimate
    num_shards: int
    num_counted: int
    num_parts: int
    num_parts_open: int
    blocks_per_shard: int
    forwards: Estimate
    forwards_open: Estimate


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes.

    Attributes:
        outputs: of one row of each tensor, before compression; ``columns`` those of all other columns.
        pixels: of one stored view; None: views are not stored.
        row: of one row in a part; measured on committed parts if there are any (``is_measured``), else bounded.
        parts: all parts; ``parts_open`` those still to build; ``parts_of_shard`` those of a shard of median size.
        means: class sums, at most; None if D is unknown.
        scratch: on the local disk of the task with the largest part.
        read: of the shards, by the parts still to build.
    """

    outputs: dict[str, int]
    columns: float
    pixels: PlannedPixels | None
    row: Estimate
    is_measured: bool
    parts: Estimate
    parts_open: Estimate
    parts_of_shard: Estimate
    means: int | None
    scratch: Estimate
    read: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Objects of the finished cache; requests of the rest of the build, and of a training's first epoch on one node."""

    num_objects: int
    build: Requests
    epoch: Requests


@dataclass(frozen=True, slots=True)
class BreakEven:
    """When a cache needs fewer teacher forwards than online training: forwards an image < students x epochs x k.

    Attributes:
        forwards_per_image: V, and one for an eval pass.
        epochs: of the config's training, if it sets them; ``num_students`` is then the smallest number that pays.
        views_per_image: k, the views of an image that an epoch shows.
    """

    forwards_per_image: int
    epochs: int | None
    num_students: int | None
    views_per_image: int


@dataclass(frozen=True, slots=True)
class CachePlan:
    """What ``cache build`` would do. ``labels`` are those of the surveyed images; None: no labels are read."""

    work: Work
    size: Size
    traffic: Traffic
    break_even: BreakEven
    labels: LabelCount | None


def plan_cache(inputs: PlanInputs) -> CachePlan:
    """
    Raises:
        CacheError: two commits overlap.
    """
    size, data = plan_size(inputs), inputs.config.data
    return CachePlan(
        work=_work(inputs),
        size=size,
        traffic=_traffic(inputs, size.row.expected),
        break_even=_break_even(inputs.config),
        labels=inputs.survey.label_count if task_of(data).members else None,
    )


def _work(inputs: PlanInputs) -> Work:
    blocks = inputs.blocks.values()
    return Work(
        rows=inputs.survey.num_rows,
        num_shards=len(blocks),
        num_counted=inputs.survey.num_counted,
        num_parts=sum(item.num_parts for item in blocks),
        num_parts_open=sum(len(item.missing) for item in blocks),
        blocks_per_shard=max(item.num_parts for item in blocks),
        forwards=inputs.forwards,
        forwards_open=inputs.forwards_open,
    )


def plan_size(inputs: PlanInputs) -> Size:
    """
    Raises:
        CacheError: two commits overlap.
    """
    outputs = {output.name: row_bytes(output) for output in outputs_of(inputs)}
    columns = _column_bytes(inputs.config.views)
    others, pixels = sum(outputs.values()) + columns, _pixel_bytes(inputs)
    raw = others + pixels.expected
    measured = _measured_row(inputs.commits)
    row = measured or Estimate(_MIN_COMPRESSED_SHARE * others, others, others) + pixels
    parts_open = inputs.forwards_open * row
    committed = sum(commit.part_size_bytes for blocks in inputs.blocks.values() for commit in blocks.committed)
    return Size(
        outputs=outputs,
        columns=columns,
        pixels=inputs.pixels,
        row=row,
        is_measured=measured is not None,
        parts=parts_open + Estimate.exactly(committed),
        parts_open=parts_open,
        parts_of_shard=_median_rows(inputs) * row,
        means=_means_bytes(inputs),
        scratch=_scratch(inputs, row + Estimate.exactly(raw)),
        read=sum(inputs.sizes[shard] * len(blocks.missing) for shard, blocks in inputs.blocks.items()),
    )


def _pixel_bytes(inputs: PlanInputs) -> Estimate:
    """Of the stored view of a row, as a mean over all rows: those of the eval pass have none."""
    if inputs.pixels is None:
        return Estimate.exactly(0)
    views = inputs.config.views.count
    mean = inputs.pixels.size_bytes * views / (views + (inputs.cache.class_means == "eval"))
    if not inputs.pixels.num_sampled:
        return Estimate.exactly(mean)
    return Estimate((1 - _SAMPLED_SPREAD) * mean, mean, (1 + _SAMPLED_SPREAD) * mean)


def outputs_of(inputs: PlanInputs) -> tuple[Output, ...]:
    """What the cache stores for each row."""
    if inputs.header is not None:
        return inputs.header.outputs
    # Without D the embedding is left out, and the rest is a lower bound.
    task = task_of(inputs.config.data)
    return stored_outputs(planned_outputs(task, inputs.cache, inputs.widths, tokens=inputs.tokens))


def _column_bytes(plan: ViewsConfig) -> float:
    """Bytes of a row's other columns, before compression; columns of canaries count by their share of the rows."""
    columns = part_schema({}, aug_param_columns(plan))
    return sum(int(column.type.bit_width) / 8 * (_CANARY_SHARE if column.nullable else 1) for column in columns)


def _measured_row(commits: Sequence[CommitSummary]) -> Estimate | None:
    """Bytes of a row in the committed parts; None if there are none."""
    rows = sum(commit.num_rows for commit in commits)
    if not rows:
        return None
    mean = sum(commit.part_size_bytes for commit in commits) / rows
    return Estimate((1 - _MEASURED_SPREAD) * mean, mean, (1 + _MEASURED_SPREAD) * mean)


def _median_rows(inputs: PlanInputs) -> Estimate:
    """Rows of all views of the median shard."""
    rows = [inputs.survey.rows[shard] * blocks.num_views for shard, blocks in inputs.blocks.items()]
    return sorted(rows, key=lambda estimate: estimate.expected)[len(rows) // 2]


def _means_bytes(inputs: PlanInputs) -> int | None:
    """An upper bound: every shard may hold every class."""
    if not inputs.num_class_sums:
        return 0
    if inputs.embedding_dim is None:
        return None
    num_classes, class_bytes = task_of(inputs.config.data).num_classes, 8 * inputs.embedding_dim + _CLASS_SUM_BYTES
    return sum(class_bytes * round(min(num_classes, rows.high)) for rows in inputs.survey.rows.values())


def _scratch(inputs: PlanInputs, row: Estimate) -> Estimate:
    """Of the largest part: its rows in spill files and in the assembled part, and its shard if that is remote.

    Args:
        row: bytes of a row in both.
    """
    parts = [Estimate.exactly(0)]
    for shard, blocks in inputs.blocks.items():
        shard_bytes = 0 if storage.protocol(inputs.urls[shard]) == "file" else inputs.sizes[shard]
        for num_views in {len(block.views) for block in blocks.missing}:
            parts.append(inputs.survey.rows[shard] * num_views * row + Estimate.exactly(shard_bytes))
    return max(parts, key=lambda estimate: estimate.expected)


def _traffic(inputs: PlanInputs, row_bytes: float) -> Traffic:
    num_parts = sum(blocks.num_parts for blocks in inputs.blocks.values())
    # Header, manifest and its two tables; class means, and the JSON that they were imported from; the linear head.
    num_published = 4 + (inputs.cache.class_means != "none") + (inputs.cache.class_means_url is not None)
    num_published += inputs.cache.logits == "head"
    num_objects = 2 * num_parts + len(inputs.urls) + inputs.num_class_sums + num_published
    return Traffic(
        num_objects=num_objects,
        build=build_requests(inputs, row_bytes=row_bytes, num_objects=num_objects),
        epoch=epoch_requests(inputs),
    )


def _break_even(config: Config) -> BreakEven:
    """A cache computes each view once; online, each student computes a forward for each view that an epoch shows."""
    has_eval_pass = config.cache is not None and config.cache.class_means == "eval"
    per_image = config.views.count + has_eval_pass
    epochs = config.train.epochs if "epochs" in config.train.model_fields_set else None
    shown = config.train.views_per_image
    num_students = None if epochs is None else per_image // (epochs * shown) + 1
    return BreakEven(per_image, epochs, num_students, shown)
