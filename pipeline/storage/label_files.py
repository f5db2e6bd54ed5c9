"""The files of labels and domains that ``data`` names, read where a config is loaded: workers get their content."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipeline.core.config_loading import build_config
from pipeline.core.errors import ConfigError, StorageInputError
from pipeline.core.redaction import redact
from pipeline.storage.objects import read
from schemas.config import Config

_MAX_BYTES = 16 << 20


def with_label_files(config: Config) -> Config:
    """The config with the content of the files that ``data.classes`` and ``data.label_map`` name, also of heads, and
    ``data.domain``.

    Raises:
        ConfigError: a file cannot be read, or its content does not fit the config.
    """
    data = config.data.model_dump(exclude_unset=True)
    sections = {"data": data, **{f"data.heads.{name}": head for name, head in data.get("heads", {}).items()}}
    sources: dict[str, str] = {}
    for where, section in sections.items():
        for key, parse in (("classes", _parse_classes), ("label_map", _parse_map)):
            if isinstance(source := section.get(key), str):
                section[key] = _read(source, parse, where=f"{where}.{key}")
                sources[f"{where}.{key}"] = redact(source)
    if (source := config.data.domain_file) is not None:
        data["domain"] = _read(source, _parse_domains, where="data.domain")
        sources["data.domain"] = redact(source)
    if not sources:
        return config
    where = ", ".join(f"{key} of {source}" for key, source in sources.items())
    return build_config({**config.model_dump(exclude_unset=True), "data": data}, where=where)


def _read(source: str, parse: Callable[[str], Any], *, where: str) -> Any:
    try:
        return parse(read(source, max_bytes=_MAX_BYTES).decode("utf-8-sig"))
    except StorageInputError as error:
        raise ConfigError(
            "this file cannot be read",
            code="config.label-file-unreadable",
            where=f"{where}: {redact(source)}",
            got=error.what if error.got is None else f"{error.what}: {error.got}",
            expected=error.expected,
            next_step=f"correct {where}, or give the content in the config",
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "this file has another form",
            code="config.label-file-form",
            where=f"{where}: {redact(source)}",
            got=str(error),
            expected=parse.__doc__,
        ) from error


def _parse_classes(text: str) -> list[str]:
    """a JSON list of names, a JSON object with the indexes 0 … K - 1 of names, or text with a name a line"""
    if not text.lstrip().startswith(("[", "{")):
        return _lines(text)
    classes: Any = json.loads(text)
    if isinstance(classes, list):
        return classes
    if sorted(classes.values()) != list(range(len(classes))):
        raise ValueError(f"indexes that are not 0 to {len(classes) - 1}")
    return sorted(classes, key=lambda name: classes[name])


def _parse_map(text: str) -> dict[str, Any]:
    """a JSON object with the class of each label, or text with a label, a space or tab, and its class a line"""
    return _entries(text, _class)


def _parse_domains(text: str) -> dict[str, Any]:
    """a JSON object with the domain of each shard id or glob, or text with a glob, a space and its domain a line"""
    return _entries(text, str)


def _entries(text: str, value_of: Callable[[str], Any]) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        return json.loads(text, object_pairs_hook=_unique)
    pairs = [line.split("\t" if "\t" in line else None, 1) for line in _lines(text)]
    if wrong := [pair for pair in pairs if len(pair) < 2]:
        raise ValueError(f"{len(wrong)} lines with one word, such as {wrong[0]}")
    return _unique([(first, value_of(second.strip())) for first, second in pairs])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(f"{len(pairs) - len(entries)} entries that occur more than once")
    return entries


def _class(text: str) -> int | str | None:
    if text == "null":
        return None
    return int(text) if text.isascii() and text.isdigit() else text


def _lines(text: str) -> list[str]:
    """Without empty ones at the end."""
    return [line.strip() for line in text.rstrip().splitlines()]
