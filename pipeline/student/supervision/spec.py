"""The spec of a supervision: the config with the values that come from its caches. Resolved without opening a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from pipeline.cache.format.header import plan_of, views_id
from pipeline.cache.read.moments import find_moments, parse_moments
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.core.config_loading import require
from pipeline.core.errors import CacheError, ConfigError
from pipeline.core.hashing import differences, seal
from pipeline.core.redaction import quoted, redact
from pipeline.shards.index import data_keys, index_settings
from pipeline.student.data.ensemble import check_same_plans
from pipeline.student.data.sources import views_in_use
from pipeline.student.run import checkpoint
from pipeline.student.supervision.pixel_inputs import cache_inputs, check_same_input
from pipeline.tasks import DOMAIN, network_keys, task_of
from schemas.cache_format import Moments
from schemas.config import Config, DataConfig, Size, StudentConfig, ViewsConfig, height_width, size_json, size_text

_TEACHER_KEYS = ("model", "kwargs", "mean", "std", "interpolation", "tokens_layer")


@dataclass(frozen=True, slots=True)
class SupervisionSpec:
    """Data, views, sizes and caches of a run, whether a cache or the config specifies them.

    Attributes:
        data: with the reading rules of the caches.
        plan: the teacher's views; without a teacher, the student's.
        student_views: the student's views, where they differ from the teacher's.
        size: input size in pixels; None: the model's default.
        caches: one for each teacher; empty with online teachers, or none.
        means_caches: the cache that holds the class means of each online teacher; None: there is none.
        moments_caches: the same for moments.
        moments: the record of the moments by which each teacher's embeddings are standardised; None: they are not.
    """

    data: DataConfig
    plan: ViewsConfig
    student_views: ViewsConfig | None
    size: Size | None
    caches: tuple[TeacherCache, ...]
    means_caches: tuple[TeacherCache | None, ...] = ()
    moments_caches: tuple[TeacherCache | None, ...] = ()
    moments: tuple[Moments | None, ...] = ()

    @property
    def all_caches(self) -> tuple[TeacherCache, ...]:
        """All caches that the run reads, in the order in which it pins their manifests."""
        online = (*self.means_caches, *self.moments_caches)
        return self.caches or tuple(cache for cache in online if cache is not None)

    @property
    def manifests(self) -> tuple[bytes, ...]:
        """The states of ``all_caches``."""
        return tuple(cache.manifest_bytes for cache in self.all_caches)

    @property
    def moments_records(self) -> dict[int, bytes]:
        """The records of ``moments``, by the number of the teacher."""
        records = {number: record for number, record in enumerate(self.moments) if record is not None}
        return {number: seal(record.model_dump(mode="json")) for number, record in records.items()}

    @property
    def student_plan(self) -> ViewsConfig:
        """The student's views: ``student_views``, else those of its teacher."""
        return self.student_views or self.plan


def resolve_spec(config: Config) -> SupervisionSpec:
    """The spec of a run, whose caches are opened in the states that the run has pinned, if it has.

    Raises:
        CacheError: there is no such cache, the config contradicts it, or two caches are incompatible.
        ConfigError: the config names one teacher or no size where there are several.
    """
    if config.teacher.mode != "cache":
        require(config, *network_keys(config.data), command=f"teacher.mode={config.teacher.mode}")
        _check_one_size(teacher_sizes(config), config.student)
        means_caches, moments_caches = _online_caches(config)
        return SupervisionSpec(
            data=config.data,
            plan=config.views,
            student_views=student_views(config, config.views),
            size=config.views.size,
            caches=(),
            means_caches=means_caches,
            moments_caches=moments_caches,
            moments=_moments(config, moments_caches) if config.teacher.mode == "online" else (),
        )
    caches = _open(config, config.data.caches)
    check_same_plans(caches)
    plan = _plan_of(caches)
    _check_same_task(config, caches[0])
    _check_same_views(config, plan, caches[0])
    _check_same_teacher(config, caches)
    spec = spec_of_caches(caches, config.data, config.student)
    return replace(spec, student_views=student_views(config, plan), moments=_moments(config, caches))


def spec_of_caches(
    caches: tuple[TeacherCache, ...], data: DataConfig, student: StudentConfig | None
) -> SupervisionSpec:
    """The spec of a run whose values come from its caches.

    Raises:
        CacheError: ``data`` contradicts the caches, or two of them are incompatible.
        ConfigError: the teachers have different input sizes, and the student has none, or a cache stores pixels; or
            ``data.num_views`` is more than a cache has.
    """
    check_same_plans(caches)
    views_in_use(caches, data)
    # All caches have the same views, classes and reading rules.
    first = caches[0]
    sizes = [cache.header.input_size for cache in caches]
    data, plan = _data_of(data, first), _plan_of(caches)
    check_same_input(plan, cache_inputs(caches))
    _check_one_size(sizes, student)
    return SupervisionSpec(
        data=data,
        plan=plan,
        student_views=None,
        size=min(sizes, key=_num_pixels),
        caches=caches,
    )


def _plan_of(caches: Sequence[TeacherCache]) -> ViewsConfig:
    """That of all caches. Raw pixels are no difference: training reads those of the first cache that stores them."""
    return plan_of(next((cache for cache in caches if cache.header.pixels is not None), caches[0]).header)


def student_views(config: Config, plan: ViewsConfig) -> ViewsConfig | None:
    """The plan of a student whose views differ from its teacher's: FunMatch's *fixed* if the teacher has eval views,
    *independent* if it has other crops (Beyer 2022, sec. 3.1).

    Raises:
        ConfigError: ``student.views`` with a teacher of mixed images, stored pixels or the same views, or without a
            teacher.
    """
    views = None if config.student is None else config.student.views
    if views is None:
        return None
    if config.teacher.mode == "none":
        got, next_step = "teacher.mode: none", "without a teacher, set the views section"
    elif views.pixels != "none":
        got, next_step = f"student.views.pixels: {views.pixels}", "remove it: a cache stores the teacher's views"
    elif plan.pixels != "none":
        got = f"views.pixels: {plan.pixels}, the pixels that the student sees"
        next_step = "remove student.views, or use views.pixels=none, which needs the shards in training"
    elif plan.mixes:
        got, next_step = (
            f"a teacher with views of kind {plan.kind}",
            "remove student.views: its outputs are for mixed images",
        )
    elif views_id(views) == views_id(plan):
        got, next_step = "the views of its teacher", "remove student.views, or set another student.views.seed"
    else:
        return views
    raise ConfigError(
        "the student's views cannot differ from its teacher's here",
        code="config.student-views",
        where="student.views",
        got=got,
        next_step=next_step,
    )


def _open(config: Config, urls: Sequence[str]) -> tuple[TeacherCache, ...]:
    """In the states that the run has pinned, if it has."""
    require(config, "run.url", command="train")
    assert config.run is not None
    pinned = checkpoint.pinned_manifests(config.run.url, len(urls))
    return tuple(open_cache(url, manifest_bytes=manifest) for url, manifest in zip(urls, pinned, strict=True))


def _online_caches(config: Config) -> tuple[tuple[TeacherCache | None, ...], tuple[TeacherCache | None, ...]]:
    """The caches with class means and those with moments of each online teacher."""
    teachers = config.teacher.models.values()
    urls = [*(section.class_means for section in teachers), *(section.moments for section in teachers)]
    opened = iter(_open(config, [url for url in urls if url is not None]))
    caches = tuple(None if url is None else next(opened) for url in urls)
    return caches[: len(teachers)], caches[len(teachers) :]


def _moments(config: Config, caches: Sequence[TeacherCache | None]) -> tuple[Moments | None, ...]:
    """Of each teacher whose embeddings are standardised, in the state that the run has pinned, if it has.

    Raises:
        CacheError: a cache has no moments.
    """
    kinds = config.teacher.standardizations(len(caches))
    return tuple(
        None if kind == "none" or cache is None else _moments_of(config, cache, number)
        for number, (kind, cache) in enumerate(zip(kinds, caches, strict=True))
    )


def _moments_of(config: Config, cache: TeacherCache, number: int) -> Moments:
    assert config.run is not None
    pinned = checkpoint.pinned_moments(config.run.url, number)
    if pinned is not None:
        return parse_moments(pinned, where=f"the run's copy of the record of the moments of {redact(cache.url)}")
    record = find_moments(cache)
    if record is None:
        raise CacheError(
            "teacher.standardize needs moments, and this cache has none in its current state",
            code="cache.no-moments",
            where=redact(cache.url),
            next_step=f"run: stillroom cache moments {quoted(cache.url)}, or set teacher.standardize=none",
        )
    return record


def teacher_sizes(config: Config) -> list[Size | None]:
    """Input sizes of the online teachers in pixels, from the config; None: the model's default."""
    return [config.views.size, *(other.size or config.views.size for other in config.teacher.others)]


def _num_pixels(size: Size) -> int:
    return prod(height_width(size))


def _check_one_size(sizes: Sequence[Size | None], student: StudentConfig | None) -> None:
    distinct_sizes = sorted({size for size in sizes if size is not None}, key=_num_pixels)
    if len({*sizes}) > 1 and (student is None or student.size is None):
        raise ConfigError(
            "the teachers have different input sizes, so the student needs a size",
            code="config.student-size-unclear",
            where="student.size",
            got=f"teachers of {', '.join(map(size_text, distinct_sizes))} pixels"
            + (" and a model's default" if None in sizes else ""),
            next_step=f"set student.size={size_json(distinct_sizes[0])}, or any other",
        )


def _check_same_task(config: Config, cache: TeacherCache) -> None:
    """Losses and metrics are those of the config's task, also where the cache is not opened."""
    task = task_of(cache.data).name
    _require_same(
        {"task": task},
        {"task": config.data.task},
        what="the task of this config is not that of the cache",
        code="cache.other-reading-rules",
        where=f"data, against {redact(cache.url)}",
        next_step=f"set data.task={task}, or build another cache",
    )


def _check_same_views(config: Config, plan: ViewsConfig, cache: TeacherCache) -> None:
    """A cache has its own views, and would silently override those of a views section."""
    unused = {"size"} if plan.box_size is None else set[str]()
    _require_same(
        plan.model_dump(mode="json"),
        config.views.model_dump(mode="json", include=config.views.model_fields_set - {"count", *unused}),
        what="the views of this config are not those of the cache",
        code="cache.other-views",
        where=redact(cache.url),
        expected=f"views id {cache.header.views_id}",
        next_step="remove the views section, or build another cache",
    )


def _check_same_teacher(config: Config, caches: Sequence[TeacherCache]) -> None:
    """A teacher named with a cache must be the cache's. Its weights are compared where they are loaded anyway."""
    given = config.teacher
    if given.model is None:
        return
    if len(caches) > 1:
        raise ConfigError(
            "the teacher section names one teacher, and this run has several",
            code="config.one-teacher-of-several",
            where="teacher.model",
            got=f"{given.model}, with {len(caches)} caches",
            next_step="remove teacher.model, or append teacher.model=null; agreement is measured for one teacher",
        )
    cache = caches[0]
    stored = cache.header.teacher
    _require_same(
        {**stored["architecture"], **stored},
        given.model_dump(mode="json", include=given.model_fields_set & set(_TEACHER_KEYS), exclude_none=True),
        what="the teacher of this config is not that of the cache",
        code="cache.other-teacher",
        where=f"teacher, against {redact(cache.url)}",
        next_step="name the cache's teacher or none at all, or build another cache",
    )


def _data_of(data: DataConfig, cache: TeacherCache) -> DataConfig:
    """The data section with the cache's reading rules, which a config may repeat but not change."""
    settings, task = index_settings(data), task_of(data)
    stored = _with_names(cache.data, settings)
    # Of evaluations alone, whose shards may have other domains than the cache, or labels where the cache reads none.
    free = {DOMAIN} if task.trains_on_targets or stored["label"] is not None else {DOMAIN, *task.settings}
    _require_same(
        stored,
        {key: settings.get(key) for key in {**settings, **stored} if key in data.model_fields_set - free},
        what="the reading rules of this config are not those of the cache",
        code="cache.other-reading-rules",
        where=f"data, against {redact(cache.url)}",
        next_step="remove these keys, or build another cache",
    )
    return data.model_copy(update={**data_keys(stored), **{key: getattr(data, key) for key in free}})


def _with_names(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The reading rules of a cache with the names of classes of a config, where the cache has none: its labels are
    numbers, and the names are for reports."""
    stored = dict(stored)
    if "classes" in settings:
        stored.setdefault("classes", settings["classes"])
    if "heads" in settings and "heads" in stored:
        named: Mapping[str, Any] = settings["heads"]
        stored["heads"] = {name: _with_names(head, named.get(name, {})) for name, head in stored["heads"].items()}
    return stored


def _require_same(
    stored: Mapping[str, Any],
    named: Mapping[str, Any],
    *,
    what: str,
    code: str,
    where: str,
    next_step: str,
    expected: str | None = None,
) -> None:
    """Each key that a config names must have the value that the cache stores."""
    changed = differences({key: stored.get(key) for key in named}, named)
    if changed:
        raise CacheError(what, code=code, where=where, got="; ".join(changed), expected=expected, next_step=next_step)
