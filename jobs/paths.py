"""Absolute paths in a config, set in the process that the user started: Ray's workers run in other directories."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from pipeline.core.errors import ConfigError
from schemas.config import CacheConfig, Config, ModelConfig, TeacherConfig, TeacherModelConfig


def with_absolute_paths(config: Config) -> Config:
    """The config with every bare path absolute and ``~`` expanded. URLs stay, and brace patterns are not expanded.

    Raises:
        StorageInputError: a URL is refused.
        ConfigError: a cache or a run is in this process's memory, which Ray's workers cannot reach.
    """
    update: dict[str, Any] = {"data": config.data.model_copy(update=_data(config))}
    for name in ("cache", "run"):
        if (section := getattr(config, name)) is not None:
            _check_shared(section.url, config.ray.address, where=f"{name}.url")
    if config.run is not None:
        update["run"] = config.run.model_copy(update={"url": storage.absolute(config.run.url)})
    if config.cache is not None:
        update["cache"] = config.cache.model_copy(update=_cache(config.cache))
    for name in ("teacher", "student"):
        section = getattr(config, name)
        if section is not None:
            update[name] = section.model_copy(update=_model(section))
    return config.model_copy(update=update)


def _check_shared(url: str, address: str, *, where: str) -> None:
    if storage.protocol(url) == "memory" and address != "none":
        raise ConfigError(
            "memory:// belongs to one process, and Ray's workers are other processes",
            code="ray.memory-url",
            where=where,
            got=url,
            expected="a URL that all processes reach",
            next_step="name a folder or a bucket, or set ray.address=none",
        )


def _model(section: ModelConfig) -> dict[str, Any]:
    urls: dict[str, Any] = {}
    if section.weights_url is not None:
        urls["weights"] = storage.absolute(section.weights_url)
    if isinstance(section, TeacherModelConfig) and section.class_means is not None:
        urls["class_means"] = storage.absolute(section.class_means)
    if isinstance(section, TeacherConfig):
        urls["others"] = tuple(other.model_copy(update=_model(other)) for other in section.others)
    return urls


def _cache(cache: CacheConfig) -> dict[str, Any]:
    urls = {"url": storage.absolute(cache.url)}
    if cache.class_means_url is not None:
        urls["class_means"] = storage.absolute(cache.class_means_url)
    return urls


def _data(config: Config) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name in ("shards", "val_shards"):
        if (patterns := getattr(config.data, name)) is not None:
            data[name] = storage.absolute_patterns(patterns)
    if (caches := config.data.cache) is not None:
        data["cache"] = storage.absolute(caches) if isinstance(caches, str) else tuple(map(storage.absolute, caches))
    for name in ("index", "local_dir"):
        if (url := getattr(config.data, name)) is not None:
            data[name] = storage.absolute(url)
    return data
