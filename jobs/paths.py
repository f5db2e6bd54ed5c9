"""Bare paths made absolute once, in the process that the user started: Ray's workers run in other directories."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from schemas.config import Config

_WITHOUT_FILE = ("random", "pretrained")


def with_absolute_paths(config: Config) -> Config:
    """The config with every bare path absolute; URLs and brace patterns stay as they are, a pattern being short.

    Raises:
        StorageInputError: a URL is refused.
    """
    update: dict[str, Any] = {"data": config.data.model_copy(update=_data(config))}
    for name in ("cache", "run"):
        if (section := getattr(config, name)) is not None:
            update[name] = section.model_copy(update={"url": storage.absolute(section.url)})
    for name in ("teacher", "student"):
        section = getattr(config, name)
        if section is not None and section.weights not in _WITHOUT_FILE:
            update[name] = section.model_copy(update={"weights": storage.absolute(section.weights)})
    return config.model_copy(update=update)


def _data(config: Config) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name in ("shards", "val_shards"):
        if isinstance(patterns := getattr(config.data, name), str):
            data[name] = storage.absolute(patterns)
        elif patterns is not None:
            data[name] = tuple(storage.absolute(pattern) for pattern in patterns)
    for name in ("cache", "index"):
        if (url := getattr(config.data, name)) is not None:
            data[name] = storage.absolute(url)
    return data
