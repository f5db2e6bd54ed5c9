"""Overrides of a command line: ``section.key=value``, the value parsed as YAML."""

from __future__ import annotations

from typing import Any, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel

from pipeline.core.config_schema import models_of
from pipeline.core.errors import ConfigError, first_line
from pipeline.core.redaction import redact_text
from pipeline.core.yaml_document import KeyPath, yaml_error
from schemas.config import Config

_ECHO_LENGTH = 60


def apply_override(document: DictConfig, override: str, where: str) -> KeyPath:
    """Sets one key, and says which."""
    key, equals, text = override.partition("=")
    place = f"{where}, override {echo(override)}"
    if not equals or not all(key.split(".")):
        raise ConfigError("this override does not set a key", where=place, expected="section.key=value")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        assert isinstance(value, dict), "a dot list makes a mapping"
        _set(document, tuple(key.split(".")), value["value"])
    except yaml.YAMLError as error:
        raise yaml_error(error, place) from error
    # OmegaConf raises ValueError or TypeError for a name where a list wants a position, its own for a position too far,
    # and IndexError for a bracket alone.
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        raise _override_error(error, place, enters_list=_enters_list(document, key)) from error
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _set(document: DictConfig, path: tuple[str, ...], value: Any) -> None:
    """A mapping is merged into a section, key by key. Anything else, such as a list or ``kwargs``, is replaced."""
    if isinstance(value, dict) and value and _is_section(path):
        for name, item in value.items():
            _set(document, (*path, str(name)), item)
    else:
        OmegaConf.update(document, ".".join(path), value, merge=False, force_add=True)


def _is_section(path: tuple[str, ...]) -> bool:
    models: list[type[BaseModel]] = [Config]
    for name in path:
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        models = [inner for field in fields if get_origin(field.annotation) is not tuple for inner in models_of(field)]
    return bool(models)


def _enters_list(document: DictConfig, key: str) -> bool:
    tree: Any = OmegaConf.to_container(document, resolve=False)
    for name in key.split("."):
        if isinstance(tree, list):
            return True
        tree = tree.get(name) if isinstance(tree, dict) else None
    return False


def _override_error(error: Exception, place: str, *, enters_list: bool) -> ConfigError:
    got = first_line(error)
    if isinstance(error, GrammarParseError):
        return ConfigError(
            "this override has an interpolation that cannot be parsed",
            code="config.override-interpolation",
            where=place,
            got=got,
            expected="${section.key} of this document, or ${oc.env:NAME} of the environment",
        )
    if enters_list:
        return ConfigError(
            "this override sets a list item that is not there",
            code="config.override-list-item",
            where=place,
            got=got,
            expected="the position, from 0, of an item that the document has",
        )
    return ConfigError("this override cannot be applied", code="config.override-refused", where=place, got=got)


def echo(value: object) -> str:
    """A value fit for a message: short, and without the credentials that a URL may carry."""
    text = repr(redact_text(value)) if isinstance(value, str) else str(value)
    return text if len(text) <= _ECHO_LENGTH else text[: _ECHO_LENGTH - 1] + "…"
