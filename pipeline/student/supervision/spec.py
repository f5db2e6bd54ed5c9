"""What a run's config leaves to its caches: classes, input size, reading rules, views. Read without opening a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cache.format.header import plan_of, views_id
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.core.config_loading import require
from pipeline.core.errors import CacheError, ConfigError
from pipeline.core.hashing import differences
from pipeline.core.redaction import redact
from pipeline.shards.index import index_settings
from pipeline.student.data.ensemble import check_same_plans
from pipeline.student.run import checkpoint
from schemas.config import Config, DataConfig, ViewsConfig

_TEACHER_KEYS = ("model", "kwargs", "mean", "std", "interpolation")


@dataclass(frozen=True, slots=True)
class SupervisionSpec:
    """The same facts, whether a cache or the config states them. ``size`` in pixels; None: the model's own."""

    data: DataConfig
    plan: ViewsConfig
    """What the teacher sees; where there is none, the student."""
    student_views: ViewsConfig | None
    """What the student sees, where that is something else."""
    num_classes: int
    size: int | None
    caches: tuple[TeacherCache, ...]
    """One a teacher; none where teachers are asked in training, or nobody is."""
    means_caches: tuple[TeacherCache | None, ...] = ()
    """Where the class means of each teacher online are kept; None: nowhere."""

    @property
    def opened(self) -> tuple[TeacherCache, ...]:
        """All caches that the run reads, in the order in which it pins their manifests."""
        return self.caches or tuple(cache for cache in self.means_caches if cache is not None)

    @property
    def student_plan(self) -> ViewsConfig:
        """The student's views, which are its teacher's unless it has its own."""
        return self.student_views or self.plan


def lesson_facts(config: Config) -> SupervisionSpec:
    """
    Raises:
        CacheError: there is no such cache, the config contradicts it, or two caches do not go together.
        ConfigError: the config names one teacher or no size where there are several.
    """
    if config.teacher.mode != "cache":
        require(config, "data.num_classes", command=f"teacher.mode={config.teacher.mode}")
        assert config.data.num_classes is not None
        own, size = student_views(config, config.views), config.views.size
        _check_size_said(config, asked_sizes(config))
        return SupervisionSpec(config.data, config.views, own, config.data.num_classes, size, (), _means_caches(config))
    return resolve_spec(config, _open(config, config.data.caches))


def resolve_spec(config: Config, caches: tuple[TeacherCache, ...]) -> SupervisionSpec:
    """What these caches state, held against what the config names.

    Raises:
        CacheError: the config contradicts them, or two of them do not go together.
        ConfigError: the config names one teacher or no size where there are several.
    """
    check_same_plans(caches)
    # All say the same of views, classes and reading rules.
    first = caches[0]
    plan = plan_of(first.header)
    _check_same_views(config, plan, first)
    _check_same_teacher(config, caches)
    return SupervisionSpec(
        data=_data_of(config, first),
        plan=plan,
        student_views=student_views(config, plan),
        num_classes=first.header.num_classes,
        size=_size_of(config, caches),
        caches=caches,
    )


def student_views(config: Config, plan: ViewsConfig) -> ViewsConfig | None:
    """The plan of a student that sees other views than its teacher: FunMatch's *fixed* where the teacher sees eval
    views, *independent* where it sees crops of its own (Beyer 2022, sec. 3.1).

    Raises:
        ConfigError: ``student.views`` with a teacher that sees mixed images or the very same views, or with none.
    """
    own = None if config.student is None else config.student.views
    if own is None:
        return None
    if config.teacher.mode == "none":
        got, next_step = "teacher.mode: none", "without a teacher, views says what the student sees"
    elif plan.mixes:
        got, next_step = f"a teacher that sees {plan.kind}", "remove student.views: its words are of mixed images"
    elif views_id(own) == views_id(plan):
        got, next_step = "the views of its teacher", "remove student.views, or set another student.views.seed"
    else:
        return own
    raise ConfigError(
        "the student cannot have views of its own here", where="student.views", got=got, next_step=next_step
    )


def _open(config: Config, urls: Sequence[str]) -> tuple[TeacherCache, ...]:
    """In the states that the run has pinned."""
    require(config, "run.url", command="train")
    assert config.run is not None
    pinned = checkpoint.pinned_manifests(config.run.url, len(urls))
    return tuple(open_cache(url, manifest_bytes=manifest) for url, manifest in zip(urls, pinned, strict=True))


def _means_caches(config: Config) -> tuple[TeacherCache | None, ...]:
    urls = [section.class_means for section in config.teacher.models.values()]
    opened = iter(_open(config, [url for url in urls if url is not None]))
    return tuple(None if url is None else next(opened) for url in urls)


def asked_sizes(config: Config) -> list[int | None]:
    """Input sizes of the teachers online in pixels, as the config says them; None: the model's own."""
    return [config.views.size, *(other.size or config.views.size for other in config.teacher.others)]


def _size_of(config: Config, caches: Sequence[TeacherCache]) -> int:
    """The teachers' input size, which the student takes unless it has its own."""
    sizes = [int(cache.header.teacher["size"]) for cache in caches]
    _check_size_said(config, sizes)
    return min(sizes)


def _check_size_said(config: Config, sizes: Sequence[int | None]) -> None:
    known = sorted({size for size in sizes if size is not None})
    if len({*sizes}) > 1 and (config.student is None or config.student.size is None):
        raise ConfigError(
            "the teachers have different input sizes, so the student's has to be said",
            where="student.size",
            got=f"teachers of {', '.join(map(str, known))} pixels" + (" and a model's own" if None in sizes else ""),
            next_step=f"set student.size={known[0]}, or any other",
        )


def _check_same_views(config: Config, plan: ViewsConfig, cache: TeacherCache) -> None:
    """A views section beside a cache must mean the cache's views: silently training on others would be a lie."""
    _require_same(
        plan.model_dump(mode="json"),
        config.views.model_dump(mode="json", include=config.views.model_fields_set - {"count", "size"}),
        what="the views of this config are not those of the cache",
        where=redact(cache.url),
        expected=f"views id {cache.header.views_id}, not {views_id(config.views)}",
        next_step="remove the views section, or build another cache",
    )


def _check_same_teacher(config: Config, caches: Sequence[TeacherCache]) -> None:
    """A teacher named beside a cache must be the cache's. Its weights are compared where they are loaded anyway."""
    given = config.teacher
    if given.model is None:
        return
    if len(caches) > 1:
        raise ConfigError(
            "the teacher section names one teacher, and this run learns from several",
            where="teacher.model",
            got=f"{given.model}, beside {len(caches)} caches",
            next_step="remove teacher.model, or append teacher.model=null; agreement is measured for one teacher",
        )
    cache = caches[0]
    stored = cache.header.teacher
    _require_same(
        {**stored["architecture"], **stored},
        given.model_dump(mode="json", include=given.model_fields_set & set(_TEACHER_KEYS), exclude_none=True),
        what="the teacher of this config is not the one whose words are cached",
        where=f"teacher, against {redact(cache.url)}",
        next_step="name the cache's teacher or none at all, or build another cache",
    )


def _data_of(config: Config, cache: TeacherCache) -> DataConfig:
    """The data section with the cache's own reading rules, which a config may repeat but not change."""
    stored = cache.data
    _require_same(
        stored,
        {key: value for key, value in index_settings(config.data).items() if key in config.data.model_fields_set},
        what="this config reads the shards otherwise than the cache did",
        where=f"data, against {redact(cache.url)}",
        next_step="remove these keys, or build another cache",
    )
    return config.data.model_copy(update={**stored, "image": ";".join(stored["image"])})


def _require_same(
    stored: Mapping[str, Any],
    named: Mapping[str, Any],
    *,
    what: str,
    where: str,
    next_step: str,
    expected: str | None = None,
) -> None:
    """What a config names must be what the cache stores; what it leaves out is the cache's to say."""
    changed = differences({key: stored[key] for key in named}, named)
    if changed:
        raise CacheError(what, where=where, got="; ".join(changed), expected=expected, next_step=next_step)
