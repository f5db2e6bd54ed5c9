"""Configs and recipes read from a path or URL."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from pipeline.core.config_loading import parse_config
from pipeline.core.errors import ConfigError, StorageInputError
from pipeline.core.redaction import redact
from pipeline.core.yaml_document import parse_document
from pipeline.storage.label_files import with_label_files
from pipeline.storage.objects import read
from schemas.config import Config

MAX_CONFIG_BYTES = 1 << 20


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Reads one YAML document and the files of labels that it names, applies overrides, resolves references, and
    checks it.

    Args:
        source: path or allowed URL of the document.
        overrides: ``train.lr=3e-4``, ``loss.0.weight=2``; the value is parsed as YAML.

    Raises:
        ConfigError: the document is invalid; one message lists all problems.
    """
    return with_label_files(parse_config(_read_text(source), overrides, where=redact(source)))


def read_document(source: str) -> DictConfig:
    """A YAML mapping, unresolved.

    Raises:
        ConfigError: the text is no mapping in plain YAML, or too large.
        RecursionError: it is nested too deeply.
    """
    return parse_document(_read_text(source), where=redact(source))[0]


def _read_text(source: str) -> str:
    try:
        return read(source, max_bytes=MAX_CONFIG_BYTES).decode("utf-8-sig")
    except StorageInputError as error:
        raise ConfigError(
            "this config cannot be read",
            code="config.unreadable",
            where=error.where,
            got=error.what if error.got is None else f"{error.what}: {error.got}",
            expected=error.expected,
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "this config is not UTF-8 text", code="config.not-utf8", where=redact(source), got=str(error)
        ) from error
