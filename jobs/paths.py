"""Absolute paths in a config, set in the process that the user started: Ray's workers run in other directories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pipeline import storage
from pipeline.core.errors import ConfigError
from schemas.config import Config, Section

S = TypeVar("S", bound=Section)
Urls = str | tuple[str, ...]
_PATTERNS = frozenset({"shards", "val_shards"})
_NAMES = _PATTERNS | {"cache", "index", "local_dir", "weights", "text_head", "class_means", "moments", "url"}


def with_absolute_paths(config: Config) -> Config:
    """The config with every bare path absolute and ``~`` expanded. URLs stay, and brace patterns are not expanded.

    Raises:
        StorageInputError: a URL is refused.
        ConfigError: a cache or a run is in this process's memory, which Ray's workers cannot reach.
    """
    for name in ("cache", "run"):
        if (section := getattr(config, name)) is not None:
            _check_shared(section.url, config.ray.address, where=f"{name}.url")
    return _with_urls(config, _absolute)


def urls_by_key(config: Config) -> dict[str, tuple[str, ...]]:
    """The paths and URLs of a config by dotted key, such as ``teacher.weights``; patterns of shards as they are."""
    found: dict[str, tuple[str, ...]] = {}

    def collect(key: str, urls: Urls) -> Urls:
        found[key] = (urls,) if isinstance(urls, str) else urls
        return urls

    _with_urls(config, collect)
    return found


def _with_urls(section: S, change: Callable[[str, Urls], Urls], prefix: str = "") -> S:
    """The section with ``change(key, urls)`` for the value of every key that names files."""
    update: dict[str, Any] = {}
    for name, value in section:
        key = f"{prefix}{name}"
        if isinstance(value, Section):
            update[name] = _with_urls(value, change, f"{key}.")
        elif name == "others":
            update[name] = tuple(_with_urls(other, change, f"{key}.{n}.") for n, other in enumerate(value))
        # Keys that may also have a word, such as pretrained, have a property that is None then.
        elif name in _NAMES and (urls := getattr(section, f"{name}_url", value)) is not None:
            update[name] = change(key, urls)
    return section.model_copy(update={name: value for name, value in update.items() if value != getattr(section, name)})


def _absolute(key: str, urls: Urls) -> Urls:
    if key.rpartition(".")[2] in _PATTERNS:
        return storage.absolute_patterns(urls)
    return storage.absolute(urls) if isinstance(urls, str) else tuple(map(storage.absolute, urls))


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
