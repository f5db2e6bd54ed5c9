"""Estimate the size and cost of a build. ``stillroom cache plan CONFIG [k.k=v …] [--measure]``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.filesize import decimal

from jobs.build_cache import check_shards
from jobs.observability.progress import duration
from jobs.paths import with_absolute_paths
from jobs.ray.cluster import cluster, num_local_tasks, num_parallel_tasks
from jobs.ray.fan_out import fan_out
from pipeline.cache.build.commit import files_present, is_dangling, read_commit_summaries
from pipeline.cache.build.context import cache_config
from pipeline.cache.build.encodings import with_encodings
from pipeline.cache.plan.build_plan import CachePlan, plan_cache
from pipeline.cache.plan.free_space import check_space
from pipeline.cache.plan.measurement import Forecast, Measurement, forecast, measure, part_time_warnings
from pipeline.cache.plan.pixel_sample import sample_pixels
from pipeline.cache.plan.plan_inputs import PlanInputs, check_labels, collect_plan_inputs, resolve_embedding_dim
from pipeline.cache.plan.plan_warnings import plan_warnings
from pipeline.cache.plan.shard_survey import Estimate
from pipeline.core.errors import ConfigError, InputError, StorageInputError
from pipeline.core.redaction import redact
from pipeline.models.summary import check_weights
from pipeline.shards.shard_urls import urls_by_id
from pipeline.student.data.order import order_of
from pipeline.student.data.sources import planned_num_views
from pipeline.tasks import task_of
from schemas.config import Config


@dataclass(frozen=True, slots=True)
class Report:
    """A plan, optionally with a measurement.

    Attributes:
        forecast: times of the build, from the measurement.
        training: steps of an epoch of the config's training, if it has one.
        warnings: reasons not to run the build or the training.
    """

    plan: CachePlan
    measurement: Measurement | None
    forecast: Forecast | None
    training: str | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(config: Config, *, measured: bool) -> Report:
    """Writes nothing. Runs the teacher only to measure, but reads its weights file where parts are missing.

    Raises:
        ConfigError: a key that a build needs is missing.
        ShardError: a shard is missing, changed, or contains no image, or no sample has the member ``data.label``.
        CacheError: the existing cache is damaged.
    """
    config = with_encodings(with_absolute_paths(config))
    inputs = _inputs(config)
    plan = plan_cache(inputs)
    warnings = plan_warnings(inputs, plan) + _build_warnings(inputs, plan)
    measurement, times = _measure(config, inputs, plan) if measured else (None, None)
    if times is not None:
        warnings += part_time_warnings(times, inputs.cache.views_per_part)
    training, training_warnings = _training(config, inputs)
    return Report(plan, measurement, times, training, (*warnings, *training_warnings))


def _inputs(config: Config) -> PlanInputs:
    cache = cache_config(config)
    assert config.data.shards is not None
    by_id = urls_by_id(config.data.shards)
    commits, present = read_commit_summaries(cache.url), files_present(cache.url)
    commits = [commit for commit in commits if not is_dangling(commit, present)]
    sizes = check_shards(cache.url, by_id, commits)
    inputs = collect_plan_inputs(config, cache, by_id, sizes, commits)
    check_labels(inputs)
    return sample_pixels(resolve_embedding_dim(inputs))


def _build_warnings(inputs: PlanInputs, plan: CachePlan) -> list[str]:
    """A lack of space and weights that do not fit the teacher's network: a build would fail, a plan warns."""
    config, warnings = inputs.config, list[str]()
    try:
        warnings += check_space(inputs, num_tasks=num_local_tasks(config.ray))
    except StorageInputError as error:
        warnings.append(_would_fail("a build", error))
    if not plan.work.num_parts_open:
        return warnings
    try:
        widths = task_of(config.data).widths
        check_weights(config.teacher, widths=widths, size=config.views.size, where="teacher")
    except InputError as error:
        warnings.append(_would_fail("a build", error))
    return warnings


def _would_fail(what: str, error: InputError) -> str:
    details = (error.where, error.got, error.expected, error.next_step)
    return f"{what} would fail: {error.what} ({'; '.join(str(text) for text in details if text is not None)})"


def _measure(config: Config, inputs: PlanInputs, plan: CachePlan) -> tuple[Measurement, Forecast]:
    """Measures in one task with the resources of a build's tasks."""
    urls = list(inputs.urls.values())
    with cluster(config.ray):
        work, shard_url = partial(measure, config), urls[len(urls) // 2]
        ((_, measurement),) = fan_out(work, [shard_url], config.ray, what="a cache task", name=redact)
        return measurement, forecast(plan, config, measurement, num_slots=num_parallel_tasks(config.ray))


def _training(config: Config, inputs: PlanInputs) -> tuple[str | None, list[str]]:
    """The steps of an epoch of the config's training, if it has one, and warnings about errors of its order."""
    train = config.train
    if not train.model_fields_set:
        return None, []
    try:
        num_images = [round(rows.expected) for rows in inputs.survey.rows.values()]
        num_views = planned_num_views(config, config.views.count)
        order = order_of(train, list(inputs.urls), num_images, config.views, num_views=num_views)
    except ConfigError as error:
        return None, [_would_fail("training", error)]
    last_rows = order.global_rows(order.num_steps - 1)
    last = f"{order.rows_dropped} rows dropped" if train.tail == "drop" else f"the last of {last_rows}"
    of_image = f" ({train.views_per_image} views of each image)" if train.views_per_image > 1 else ""
    steps = f"{order.num_steps} steps of {train.global_batch_size} rows{of_image}"
    return f"{steps}, {last} (train.tail: {train.tail})", []


def describe(report: Report) -> str:
    """The text that the command prints."""
    lines = [*_plan_lines(report.plan), *_time_lines(report.measurement, report.forecast)]
    if report.training is not None:
        lines.append(("epoch", report.training))
    texts = [f"{name:<16}{text}" for name, text in lines]
    return "\n".join([*texts, *(f"warning: {warning}" for warning in report.warnings)])


def _plan_lines(plan: CachePlan) -> list[tuple[str, str]]:
    work, size, traffic = plan.work, plan.size, plan.traffic
    how = "counted" if work.rows.is_exact else f"{work.num_counted} shards counted, the others estimated from a few"
    stored = "as measured in its parts" if size.is_measured else "before compression"
    columns = ", ".join([f"{name} {num_bytes}" for name, num_bytes in size.outputs.items()])
    build, epoch = traffic.build, traffic.epoch
    columns += f", pixels {size.pixels.size_bytes:.0f}" if size.pixels is not None else ""
    lines = [
        ("images", f"{_count(work.rows)} in {work.num_shards} shards ({how})"),
        ("labels", "none (data.label is null)" if plan.labels is None else str(plan.labels)),
        ("parts", f"{work.num_parts}, {work.blocks_per_shard} per shard; {work.num_parts_open} still to build"),
        ("bytes per row", f"{size.row.expected:.0f} {stored} ({columns}, other columns {size.columns:.0f})"),
        ("bytes", f"{_bytes(size.parts)}, {decimal(round(size.parts_of_shard.expected))} per shard"),
        ("still to write", _bytes(size.parts_open)),
        ("scratch", f"{_bytes(size.scratch)} per task"),
        ("shards read", f"{decimal(size.read)}: each shard once per part"),
        ("objects", str(traffic.num_objects)),
        (
            "requests",
            f"{build.put} put, {build.get} get, {build.list} list; at most {epoch.get} get per epoch and node",
        ),
        ("teacher", f"{_count(work.forwards)} forwards, {_count(work.forwards_open)} still to do"),
        ("break-even", _break_even(plan)),
    ]
    if size.pixels is not None and size.pixels.num_sampled:
        lines.insert(
            4,
            (
                "pixels",
                f"{size.pixels.size_bytes:.0f} bytes and {1e6 * size.pixels.encode_s:.0f} us of CPU a view, by "
                f"{size.pixels.num_sampled} images of the first shard",
            ),
        )
    if size.means:
        lines.insert(6, ("class sums", f"at most {decimal(size.means)}"))
    return lines


def _break_even(plan: CachePlan) -> str:
    even = plan.break_even
    shown = f" x {even.views_per_image} views" if even.views_per_image > 1 else ""
    text = f"fewer teacher forwards than online training if students x epochs{shown} > {even.forwards_per_image}"
    if even.epochs is None:
        return text
    students = f"{even.num_students} student{'s' * (even.num_students != 1)}"
    return f"{text}; with train.epochs={even.epochs} from {students} on"


def _time_lines(measured: Measurement | None, times: Forecast | None) -> list[tuple[str, str]]:
    if measured is None or times is None:
        return []
    stages = measured.stages
    return [
        ("measured", f"{measured.num_images} images x {measured.num_views} views on {measured.device}"),
        (
            "stages alone",
            f"decode {_milliseconds(stages.decode_s)} per image, view {_milliseconds(stages.view_s)}, "
            f"forward {_milliseconds(stages.forward_s)} per row",
        ),
        ("a task", f"{1 / measured.row_s:.1f} rows/s; a worker starts in {duration(measured.load_s)}"),
        ("a part", f"{duration(times.part_s)}, {duration(measured.fetch_s)} of it to fetch the shard"),
        ("build", f"{duration(times.build_s)} with {times.num_slots} task{'s' * (times.num_slots != 1)} in parallel"),
        ("bytes to write", f"{decimal(round(times.size_bytes))}, {measured.row_bytes:.0f} per row as stored"),
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _count(estimate: Estimate) -> str:
    if estimate.is_exact:
        return f"{estimate.expected:.0f}"
    return f"about {estimate.expected:.0f} ({estimate.low:.0f} to {estimate.high:.0f})"


def _bytes(estimate: Estimate) -> str:
    if estimate.is_exact:
        return decimal(round(estimate.expected))
    return (
        f"about {decimal(round(estimate.expected))} ({decimal(round(estimate.low))} to {decimal(round(estimate.high))})"
    )
