"""A YAML mapping and the line of each of its keys."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.core.errors import ConfigError

KeyPath = tuple[str | int, ...]
# Of a document with its aliases followed: each may name a list that names others, which doubles it line by line.
_MAX_NODES = 10_000


def parse_document(text: str, *, where: str) -> tuple[DictConfig, dict[KeyPath, str]]:
    """A YAML mapping as it is written, and the line of each key.

    Raises:
        ConfigError: no mapping in plain YAML, or a larger one than is read.
        RecursionError: it is nested too deeply.
    """
    places = _key_lines(text, where)
    return _parse(text, where), places


def _key_lines(text: str, where: str) -> dict[KeyPath, str]:
    """``line 7`` for every key and list item, by its path."""
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise yaml_error(error, where) from error
    if root is None:
        raise ConfigError("this config is empty", where=where, expected="a YAML mapping such as data: {shards: …}")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            "this config is not a mapping",
            where=where,
            got="a list" if isinstance(root, yaml.SequenceNode) else "a single value",
            expected="sections such as data: {shards: …}",
        )
    if (num_nodes := _num_nodes(root, {})) > _MAX_NODES:
        raise ConfigError(
            "this config is too large once its aliases are followed",
            where=where,
            got=f"{num_nodes} keys and values",
            expected=f"at most {_MAX_NODES}",
            next_step="write many shards as one pattern, such as train-{000000..001280}.tar",
        )
    return dict(_walk(root, ()))


def _num_nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """Nodes below and with this one, those behind an alias each time that it is used; each is visited once."""
    if id(node) not in counted:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        items = node.value if isinstance(node, yaml.SequenceNode) else (child for pair in pairs for child in pair)
        counted[id(node)] = 1 + sum(_num_nodes(item, counted) for item in items)
    return counted[id(node)]


def _walk(node: yaml.Node, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    children: Iterable[tuple[str | int, yaml.Node, yaml.Node]] = ()
    if isinstance(node, yaml.MappingNode):
        children = ((str(key.value), key, value) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        children = ((position, item, item) for position, item in enumerate(node.value))
    for name, marked, value in children:
        yield (*path, name), f"line {marked.start_mark.line + 1}"
        yield from _walk(value, (*path, name))


def _parse(text: str, where: str) -> DictConfig:
    try:
        document = OmegaConf.load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise yaml_error(error, where) from error
    except OmegaConfBaseException as error:
        raise omegaconf_error(error, where) from error
    assert isinstance(document, DictConfig), "only mappings come this far"
    return document


def yaml_error(error: yaml.YAMLError, where: str) -> ConfigError:
    if not isinstance(error, yaml.MarkedYAMLError):
        return ConfigError("this config is not YAML", where=where, got=" ".join(str(error).split()))
    if "single document" in (error.context or ""):
        return ConfigError(
            "this config holds several YAML documents", where=where, expected="one, without a --- between"
        )
    mark = error.problem_mark or error.context_mark
    place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
    return ConfigError("this config is not YAML", where=place, got=error.problem or error.context)


def omegaconf_error(error: OmegaConfBaseException, where: str) -> ConfigError:
    return ConfigError(
        "this value cannot be resolved",
        where=f"{where}, {error.full_key}" if error.full_key else where,
        got=(error.msg or str(error)).splitlines()[0],
        expected="${section.key} of this document, or ${oc.env:NAME} of the environment",
    )
