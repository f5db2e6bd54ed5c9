"""One YAML document and overrides to one checked ``Config``; mistakes are named by key, line and nearest name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipeline.core.config_overrides import apply_override, echo
from pipeline.core.config_problems import config_error, is_inside, merged_problems, problem_of
from pipeline.core.config_schema import description
from pipeline.core.errors import ConfigError
from pipeline.core.yaml_document import KeyPath, omegaconf_error, parse_document
from schemas.config import Config


def parse_config(text: str, overrides: Sequence[str] = (), *, where: str) -> Config:
    """Overrides, resolves and checks the text of one YAML document.

    Args:
        overrides: ``train.lr=3e-4``, ``loss.0.weight=2``; the value is parsed as YAML.
        where: name of the document for messages.

    Raises:
        ConfigError: everything that is wrong, in one message.
    """
    try:
        document, places = parse_document(text, where=where)
        for override in overrides:
            path = apply_override(document, override, where)
            places = {known: place for known, place in places.items() if not is_inside(known, path)}
            places[path] = f"override {echo(override)}"
        return _validate(_resolve(document, where), where=where, places=places)
    except RecursionError as error:
        raise ConfigError(
            "this config is nested too deeply, or an alias in it stands inside of what it names", where=where
        ) from error


def build_config(tree: Mapping[str, Any], *, where: str) -> Config:
    """Checks a tree of plain values.

    Raises:
        ConfigError: everything that is wrong with it, in one message.
    """
    return _validate(tree, where=where, places={})


def require(config: Config, *keys: str, command: str, section: str = "") -> None:
    """Refuses a config in which a key that a command cannot do without is null, empty or absent.

    Args:
        section: path of the config in a larger document, such as ``students.kd.``, before which its keys stand there.

    Raises:
        ConfigError: names every such key and what it means.
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
    assert isinstance(tree, dict), "only mappings come this far"
    return {str(key): value for key, value in tree.items()}


def _validate(tree: Mapping[str, Any], *, where: str, places: Mapping[KeyPath, str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = merged_problems([problem_of(details, tree) for details in error.errors(include_url=False)])
        raise config_error(problems, where, places) from error
