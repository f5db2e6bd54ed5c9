"""What a run's config leaves to its cache: classes, input size, reading rules, views. Read without opening a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.cache.identity import plan_of, views_id
from pipeline.cache.reader import TeacherCache, open_cache
from pipeline.errors import CacheError
from pipeline.fingerprint import differences
from pipeline.shards.index import index_settings
from pipeline.student import checkpoint
from schemas.config import Config, DataConfig, ViewsConfig

_TEACHER_KEYS = ("model", "kwargs", "mean", "std", "interpolation")


@dataclass(frozen=True, slots=True)
class LessonFacts:
    """The same facts, whether a cache or the config states them. ``size`` in pixels; None: the model's own."""

    data: DataConfig
    plan: ViewsConfig
    num_classes: int
    size: int | None
    cache: TeacherCache | None

    @property
    def teacher_weights(self) -> str | None:
        """Digest of the weights of the teacher whose words are cached."""
        return None if self.cache is None else str(self.cache.header.teacher["weights"])


def lesson_facts(config: Config) -> LessonFacts:
    """
    Raises:
        CacheError: there is no such cache, or the config contradicts it.
    """
    if config.teacher.mode != "cache":
        assert config.data.num_classes is not None
        return LessonFacts(config.data, config.views, config.data.num_classes, config.views.size, None)
    assert config.data.cache is not None
    assert config.run is not None
    cache = open_cache(config.data.cache, manifest_bytes=checkpoint.pinned_manifest(config.run.url))
    header = cache.header
    plan = plan_of(header)
    _check_same_views(config, plan, cache)
    _check_same_teacher(config, cache)
    return LessonFacts(_data_of(config, cache), plan, header.num_classes, int(header.teacher["size"]), cache)


def _check_same_views(config: Config, plan: ViewsConfig, cache: TeacherCache) -> None:
    """A views section beside a cache must mean the cache's views: silently training on others would be a lie."""
    _require_same(
        plan.model_dump(mode="json"),
        config.views.model_dump(mode="json", include=config.views.model_fields_set - {"count", "size"}),
        what="the views of this config are not those of the cache",
        where=storage.redact(cache.url),
        wanted=f"views id {cache.header.views_id}, not {views_id(config.views)}",
        next_step="remove the views section, or build another cache",
    )


def _check_same_teacher(config: Config, cache: TeacherCache) -> None:
    """A teacher named beside a cache must be the cache's. Its weights are compared where they are loaded anyway."""
    stored, given = cache.header.teacher, config.teacher
    if given.model is None:
        return
    _require_same(
        {**stored["architecture"], **stored},
        given.model_dump(mode="json", include=given.model_fields_set & set(_TEACHER_KEYS), exclude_none=True),
        what="the teacher of this config is not the one whose words are cached",
        where=f"teacher, against {storage.redact(cache.url)}",
        next_step="name the cache's teacher or none at all, or build another cache",
    )


def _data_of(config: Config, cache: TeacherCache) -> DataConfig:
    """The data section with the cache's own reading rules, which a config may repeat but not change."""
    stored = cache.header.data
    _require_same(
        stored,
        {key: value for key, value in index_settings(config.data).items() if key in config.data.model_fields_set},
        what="this config reads the shards otherwise than the cache did",
        where=f"data, against {storage.redact(cache.url)}",
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
    wanted: str | None = None,
) -> None:
    """What a config names must be what the cache stores; what it leaves out is the cache's to say."""
    changed = differences({key: stored[key] for key in named}, named)
    if changed:
        raise CacheError(what, where=where, got="; ".join(changed), wanted=wanted, next_step=next_step)
