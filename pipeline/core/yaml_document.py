"""A YAML mapping and the line of each of its keys."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.core.errors import ConfigError

KeyPath = tuple[str | int, ...]
EXPECTED_INTERPOLATION = "${section.key} of this document, or ${oc.env:NAME} of the environment"
# Counted with aliases followed. An alias may name a list of aliases, so the size can double with every line.
_MAX_NODES = 10_000


def parse_document(text: str, *, where: str) -> tuple[DictConfig, dict[KeyPath, str]]:
    """An unresolved YAML mapping, and the line of each key.

    Raises:
        ConfigError: the text is no mapping in plain YAML, or too large.
        RecursionError: it is nested too deeply.
    """
    origins = _key_lines(text, where)
    return _parse(text, where), origins


def _key_lines(text: str, where: str) -> dict[KeyPath, str]:
    """``line 7`` for every key and list item, by its path."""
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise yaml_error(error, where) from error
    if root is None:
        raise ConfigError(
            "this config is empty",
            code="config.empty",
            where=where,
            expected="a YAML mapping such as data: {shards: …}",
        )
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            "this config is not a mapping",
            code="config.not-a-mapping",
            where=where,
            got="a list" if isinstance(root, yaml.SequenceNode) else "a single value",
            expected="sections such as data: {shards: …}",
        )
    if (num_nodes := _num_nodes(root, {})) > _MAX_NODES:
        raise ConfigError(
            "this config is too large after its aliases are followed",
            code="config.too-large",
            where=where,
            got=f"{num_nodes} keys and values",
            expected=f"at most {_MAX_NODES}",
            next_step="write many shards as one pattern, such as train-{000000..001280}.tar",
        )
    return dict(_walk(root, ()))


def _num_nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """Number of nodes from this one down. Nodes behind an alias count at every use, and each is visited once."""
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
    assert isinstance(document, DictConfig), "_key_lines refuses anything else"
    return document


def yaml_error(error: yaml.YAMLError, where: str) -> ConfigError:
    if not isinstance(error, yaml.MarkedYAMLError):
        return ConfigError(
            "this config is not YAML", code="config.not-yaml", where=where, got=" ".join(str(error).split())
        )
    if "single document" in (error.context or ""):
        return ConfigError(
            "this config has several YAML documents",
            code="config.several-documents",
            where=where,
            expected="one, without a --- between",
        )
    mark = error.problem_mark or error.context_mark
    origin = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
    return ConfigError(
        "this config is not YAML", code="config.not-yaml", where=origin, got=error.problem or error.context
    )


def omegaconf_error(error: OmegaConfBaseException, where: str) -> ConfigError:
    return ConfigError(
        "this value cannot be resolved",
        code="config.unresolved-value",
        where=f"{where}, {error.full_key}" if error.full_key else where,
        got=(error.msg or str(error)).splitlines()[0],
        expected=EXPECTED_INTERPOLATION,
    )
