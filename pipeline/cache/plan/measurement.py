"""Measures how fast this machine builds a part: each stage alone on a short sample, then one small part in scratch."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from pipeline import storage
from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import PartTask, build_part
from pipeline.cache.plan.build_plan import CachePlan
from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.core.temporary import temporary_folder
from pipeline.shards.decode import BadImageError, decode
from pipeline.shards.members import image_extensions
from pipeline.shards.shard_urls import shard_id
from pipeline.shards.tar import Sample, read_samples
from pipeline.shards.writer import Members, pack_shards
from pipeline.tasks import task_of
from pipeline.teacher.inference import load_teacher
from pipeline.teacher.numerics import pick_device, pin_numerics
from pipeline.teacher.rendering import Rendering, read_groups
from schemas.cache_format import ViewBlock
from schemas.config import Config

_BUILD_S, _STAGE_S = 6.0, 1.5
_NUM_RENDERED, _VIEWS_RENDERED = 64, 4
_SHORT_PART_S, _LONG_PART_S = 10, 3600

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of each stage alone: decode an image, render a view, one row of a full batch through the teacher."""

    decode_s: float
    view_s: float
    forward_s: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """One task alone on its CPUs and GPU.

    Attributes:
        device: its name, and the number of CPU threads.
        num_images, num_views: of the part that was built.
        fetch_s: of the sampled shard; almost 0 if it is local.
        load_s: until a new worker process can begin its first part.
        row_s: one row of that part, with all stages overlapped as in a build.
        row_bytes: one row of that part.
    """

    device: str
    num_images: int
    num_views: int
    fetch_s: float
    load_s: float
    stages: Stages
    row_s: float
    row_bytes: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds of one part of mean size and of the rest of the build, and the bytes that the rest writes."""

    part_s: float
    build_s: float
    size_bytes: float
    num_slots: int


def measure(config: Config, shard_url: str) -> Measurement:
    """Writes only to scratch, which it removes. Loads the teacher twice: for its stage, and for the part.

    Raises:
        ShardError: no image of the shard's first mix group can be used.
        ModelError: the teacher cannot be loaded.
    """
    assert config.cache is not None
    pin_numerics(config.ray.cpus_per_task)
    with temporary_folder() as folder:
        scratch = Path(folder)
        fetch_s, local = _timed(lambda: storage.local_copy(shard_url, scratch / "shard"))
        samples = _usable(local, config, shard_url)
        stages = _time_stages(samples, config, shard_id(shard_url))
        affordable_rows = int(_BUILD_S / (stages.view_s + stages.forward_s))
        # The teacher pads a short batch, which costs as much as a full one.
        samples = samples[: max(1, affordable_rows // config.teacher.batch_size) * config.teacher.batch_size]
        num_views = max(1, min(affordable_rows // len(samples), config.views.count, config.cache.views_per_part))
        part = _small_part(config, samples, scratch, num_views)
        load_s, _ = _timed(lambda: prepare(part.config))
        build_s, commit = _timed(lambda: build_part(part))
    rows, env = commit.written * num_views, commit.environment
    return Measurement(
        device=f"{env['device']}, {env['threads']} threads",
        num_images=commit.written,
        num_views=num_views,
        fetch_s=fetch_s,
        load_s=load_s,
        stages=stages,
        row_s=build_s / rows,
        row_bytes=commit.part.size_bytes / rows,
    )


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _usable(local: Path, config: Config, where: str) -> list[Sample]:
    """The decodable samples of the shard's first mix group."""
    samples = list(islice(read_samples(local, config.data, where=where), config.views.mix_group))
    reasons = [_unusable(sample, config) for sample in samples]
    usable = [sample for sample, reason in zip(samples, reasons, strict=True) if reason is None]
    if not usable:
        raise ShardError(
            "none of the first images of this shard can be used",
            code="shard.bad-samples",
            where=redact(where),
            got=f"{len(samples)} samples; {samples[0].key}: {reasons[0]}",
            next_step="repair the shard, or name another one first in data.shards",
        )
    return usable


def _unusable(sample: Sample, config: Config) -> str | None:
    """Why this sample cannot be used; None if it can."""
    if sample.status != "ok":
        return sample.status
    try:
        decode(sample.data, max_pixels=config.data.max_pixels)
    except BadImageError as error:
        return f"{error.status}: {error.reason}"
    return None


def _time_stages(samples: list[Sample], config: Config, shard: str) -> Stages:
    device = pick_device(config.ray.gpus_per_task > 0)
    task, cache = task_of(config.data), config.cache
    grid = None if cache is None else task.grid(cache.grid)
    teacher = load_teacher(config.teacher, widths=task.widths, size=config.views.size, device=device, grid=grid)
    samples, max_pixels = samples[:_NUM_RENDERED], config.data.max_pixels
    num_views, spec = min(config.views.count, _VIEWS_RENDERED), teacher.loaded.input
    rendering = Rendering.of(shard, config.views, ViewBlock(start=0, stop=num_views), spec, config.data)
    with ThreadPoolExecutor(config.ray.cpus_per_task) as pool:
        decode_s, _ = _repeated(
            lambda: list(pool.map(lambda sample: decode(sample.data, max_pixels=max_pixels), samples))
        )
        render_s, (group, *_) = _repeated(lambda: list(read_groups(iter(samples), rendering, pool, builder=None)))
    # A short batch is padded, so the time is that of a full one.
    forward_s, _ = _repeated(lambda: teacher.infer(group.pixels_VNCHW[0][: teacher.batch_size]))
    return Stages(
        decode_s=decode_s / len(samples),
        view_s=max(render_s - decode_s, 0.0) / len(samples) / num_views,
        forward_s=forward_s / teacher.batch_size,
    )


def _repeated(work: Callable[[], T]) -> tuple[float, T]:
    """Mean seconds of a call after a warm-up call, and the last result."""
    result, calls, began = work(), 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - began < _STAGE_S:
        result = work()
        calls += 1
    return (time.perf_counter() - began) / calls, result


def _small_part(config: Config, samples: list[Sample], scratch: Path, num_views: int) -> PartTask:
    """A build of these samples only, into a cache in scratch."""
    assert config.cache is not None
    packed = (_members(sample, config) for sample in samples)
    (shard,) = pack_shards(packed, f"{scratch}/sample-%d.tar", shard_size=len(samples))
    settings = {"url": str(scratch / "cache"), "class_means": "none", "views_per_part": num_views}
    small = config.model_copy(
        update={
            "data": config.data.model_copy(update={"shards": shard}),
            "views": config.views.model_copy(update={"count": num_views}),
            "cache": config.cache.model_copy(update=settings),
        }
    )
    return PartTask(small, shard, ViewBlock(start=0, stop=num_views))


def _members(sample: Sample, config: Config) -> tuple[str, Members]:
    members = {image_extensions(config.data)[0]: sample.data}
    target = {} if sample.target is None else task_of(config.data).encode(sample.target)
    return sample.key, {**members, **target}


def forecast(plan: CachePlan, config: Config, measurement: Measurement, *, num_slots: int) -> Forecast:
    """Extrapolates a measurement to the rest of the build, with so many tasks at once."""
    assert config.cache is not None
    views = min(config.cache.views_per_part, config.views.count)
    # An image is decoded once for all views of a part; the measured part may have had fewer views.
    row_s = measurement.row_s + measurement.stages.decode_s * (1 / views - 1 / measurement.num_views)
    rows = plan.work.rows.expected / plan.work.num_shards * views
    busy_s = plan.work.forwards_open.expected * row_s + plan.work.num_parts_open * measurement.fetch_s
    return Forecast(
        part_s=rows * row_s + measurement.fetch_s,
        build_s=busy_s / num_slots,
        size_bytes=plan.work.forwards_open.expected * measurement.row_bytes,
        num_slots=num_slots,
    )


def part_time_warnings(times: Forecast, views_per_part: int) -> list[str]:
    """A part of seconds is mostly start and end; a part of hours loses hours when its node is lost."""
    if times.part_s > _LONG_PART_S and views_per_part > 1:
        return [
            f"a part takes {times.part_s / 3600:.1f} hours, all of which are lost with its node; "
            "lower cache.views_per_part"
        ]
    if times.part_s < _SHORT_PART_S:
        return [f"a part takes {times.part_s:.1f} s; larger shards or more cache.views_per_part have less overhead"]
    return []
