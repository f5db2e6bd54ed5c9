"""The encoding of logits where ``cache.logits`` is ``auto``: that of the existing cache, or the default of the task."""

from __future__ import annotations

from pipeline.cache.format.header import find_header
from pipeline.tasks import task_of
from schemas.cache_format import Header
from schemas.config import CacheConfig, Config

_AUTO = "auto"


def with_encodings(config: Config, cache_url: str | None = None) -> Config:
    """The config with the encoding that a build uses in place of ``auto``. Reads the header of the cache.

    Args:
        cache_url: of the cache; default: that of the config.

    Raises:
        CacheError: the header is damaged, or has another format version.
    """
    cache = config.cache
    if cache is None or cache.logits != _AUTO:
        return config
    return config.model_copy(update={"cache": resolve(config, cache, find_header(cache_url or cache.url))})


def resolve(config: Config, cache: CacheConfig, header: Header | None = None) -> CacheConfig:
    """The section without ``auto``.

    Args:
        header: of the existing cache; None: there is none, or it was not read.
    """
    if cache.logits != _AUTO:
        return cache
    task = task_of(config.data)
    # A cache with other classes is refused later, by the difference and not by an encoding that does not fit.
    is_extended = header is not None and header.num_classes == task.num_classes
    logits = str(header.teacher["logits"]) if header is not None and is_extended else task.default_logits
    return cache.model_copy(update={"logits": logits})
