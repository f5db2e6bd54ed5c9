"""Turns one YAML document and overrides into a checked ``Config``. Errors name key, line and nearest name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipeline.core.config_problems import config_error, description, echo, is_inside, sections_of
from pipeline.core.errors import ConfigError, first_line
from pipeline.core.yaml_document import EXPECTED_INTERPOLATION, KeyPath, omegaconf_error, parse_document, yaml_error
from schemas.config import Config

S = TypeVar("S", bound=BaseModel)


def parse_config(text: str, overrides: Sequence[str] = (), *, where: str) -> Config:
    """Overrides, resolves and checks the text of one YAML document.

    Args:
        overrides: ``train.lr=3e-4``, ``loss.0.weight=2``; the value is parsed as YAML.
        where: name of the document for messages.

    Raises:
        ConfigError: names all problems of the document and the overrides.
    """
    try:
        document, origins = parse_document(text, where=where)
        for override in overrides:
            path = _apply_override(document, override, where)
            origins = {key: origin for key, origin in origins.items() if not is_inside(key, path)}
            origins[path] = f"override {echo(override)}"
        return build_section(Config, _resolve(document, where), where=where, origins=origins)
    except RecursionError as error:
        raise ConfigError(
            "this config is nested too deeply, or an alias in it refers to a value that contains the alias",
            code="config.too-deep",
            where=where,
        ) from error


def build_config(tree: Mapping[str, Any], *, where: str) -> Config:
    """Checks a tree of plain values.

    Raises:
        ConfigError: names all problems of the tree.
    """
    return build_section(Config, tree, where=where)


def build_section(
    kind: type[S], tree: Mapping[str, Any], *, where: str, origins: Mapping[KeyPath, str] | None = None
) -> S:
    """Checks a tree of plain values against ``Config``, or a model whose keys have the same names.

    Args:
        origins: the origin of each key in a text, such as ``line 7``.

    Raises:
        ConfigError: names all problems of the tree.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise config_error(error, tree, where, origins or {}) from error


def require(config: BaseModel, *keys: str, command: str, section: str = "") -> None:
    """Refuses a config in which a required key of a command is null, empty or absent.

    Args:
        section: path of the config in a larger document, such as ``students.kd.``, for messages.

    Raises:
        ConfigError: names every such key and its description.
    """
    missing = [key for key in keys if _value(config, key) in (None, ())]
    if missing:
        raise ConfigError(
            f"{command} needs {'a key that is' if len(missing) == 1 else 'keys that are'} not in this config",
            code="config.missing-key",
            got=f"no {', '.join(missing)}",
            expected="".join(f"\n    {key}: {description(key)}" for key in missing),
            next_step=f"add to the YAML, or append {' '.join(f'{section}{key}=…' for key in missing)}",
        )


def _value(config: BaseModel, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        if value is not None:
            value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


def _resolve(document: DictConfig, where: str) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(document, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise omegaconf_error(error, where) from error
    assert isinstance(tree, dict), "parse_document returns mappings only"
    return {str(key): value for key, value in tree.items()}


def _apply_override(document: DictConfig, override: str, where: str) -> KeyPath:
    """Sets one key and returns its path."""
    key, equals, text = override.partition("=")
    origin = f"{where}, override {echo(override)}"
    if not equals or not all(key.split(".")):
        raise ConfigError(
            "this override sets no key", code="config.override-without-key", where=origin, expected="section.key=value"
        )
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        assert isinstance(value, dict), "a dot list is a mapping"
        _set(document, tuple(key.split(".")), value["value"])
    except yaml.YAMLError as error:
        raise yaml_error(error, origin) from error
    # OmegaConf raises ValueError or TypeError for a name instead of a list position, its own error for a position out
    # of range, and IndexError for a single bracket.
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        raise _override_error(error, origin, enters_list=_enters_list(document, key)) from error
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _set(document: DictConfig, path: tuple[str, ...], value: Any) -> None:
    """Merges a mapping into a section, key by key. Replaces any other value, such as a list or ``kwargs``."""
    if isinstance(value, dict) and value and _is_section(path):
        for name, item in value.items():
            _set(document, (*path, str(name)), item)
    else:
        OmegaConf.update(document, ".".join(path), value, merge=False, force_add=True)


def _is_section(path: tuple[str, ...]) -> bool:
    models: list[type[BaseModel]] = [Config]
    for name in path:
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        models = [
            inner for field in fields if get_origin(field.annotation) is not tuple for inner in sections_of(field)
        ]
    return bool(models)


def _enters_list(document: DictConfig, key: str) -> bool:
    tree: Any = OmegaConf.to_container(document, resolve=False)
    for name in key.split("."):
        if isinstance(tree, list):
            return True
        tree = tree.get(name) if isinstance(tree, dict) else None
    return False


def _override_error(error: Exception, origin: str, *, enters_list: bool) -> ConfigError:
    got = first_line(error)
    if isinstance(error, GrammarParseError):
        return ConfigError(
            "this override has an interpolation that cannot be parsed",
            code="config.override-interpolation",
            where=origin,
            got=got,
            expected=EXPECTED_INTERPOLATION,
        )
    if enters_list:
        return ConfigError(
            "this override sets a list item that does not exist",
            code="config.override-list-item",
            where=origin,
            got=got,
            expected="the position, from 0, of an item of the list",
        )
    return ConfigError("this override cannot be applied", code="config.override-refused", where=origin, got=got)
