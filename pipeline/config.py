"""One YAML document and overrides to one checked ``Config``; mistakes are named by key, line and nearest name."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.errors import ConfigError, StorageInputError, first_line
from pipeline.redaction import redact, redact_text
from pipeline.storage import read
from schemas.config import Config

KeyPath = tuple[str | int, ...]
_ECHO_LENGTH = 60
MAX_CONFIG_BYTES = 1 << 20
# Of a document with its aliases followed: each may name a list that names others, which doubles it line by line.
_MAX_NODES = 10_000


@dataclass(frozen=True, slots=True)
class _Problem:
    """One thing that is wrong with one key."""

    path: KeyPath
    what: str
    got: str | None = None
    wanted: str | None = None
    hint: str | None = None


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides, resolves and checks one YAML document.

    Args:
        source: path or allowed URL of the document.
        overrides: ``train.lr=3e-4``, ``loss.0.weight=2``; the value is parsed as YAML.

    Raises:
        ConfigError: everything that is wrong, in one message.
    """
    where = redact(source)
    try:
        document, places = read_document(source)
        for override in overrides:
            path = _apply(document, override, where)
            places = {known: place for known, place in places.items() if not _is_inside(known, path)}
            places[path] = f"override {_echo(override)}"
        return _validate(_resolve(document, where), where=where, places=places)
    except RecursionError as error:
        raise ConfigError(
            "this config is nested too deeply, or an alias in it stands inside of what it names", where=where
        ) from error


def read_document(source: str) -> tuple[DictConfig, dict[KeyPath, str]]:
    """A YAML mapping as it is written, and the line of each key.

    Raises:
        ConfigError: no mapping in plain YAML, or a larger one than is read.
        RecursionError: it is nested too deeply.
    """
    where, text = redact(source), _read_text(source)
    places = _key_lines(text, where)
    return _parse(text, where), places


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
            wanted="".join(f"\n    {key}: {_description(key)}" for key in missing),
            next_step=f"add to the YAML, or append {' '.join(f'{section}{key}=…' for key in missing)}",
        )


def _value(config: BaseModel, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        if value is not None:
            value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


def _description(key: str) -> str:
    *parents, name = key.split(".")
    for model in _models_at(tuple(parents)):
        field = model.model_fields[name]
        sections = _models_of(field)
        listed = f"a list of terms, named {', '.join(_loss_names())}"
        return field.description or (sections[0].__doc__ if len(sections) == 1 else None) or listed
    raise AssertionError(f"{key} is not a key of the config")


def _read_text(source: str) -> str:
    try:
        return read(source, max_bytes=MAX_CONFIG_BYTES).decode("utf-8-sig")
    except StorageInputError as error:
        raise ConfigError(
            "this config cannot be read",
            where=error.where,
            got=error.what if error.got is None else f"{error.what}: {error.got}",
            wanted=error.wanted,
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("this config is not UTF-8 text", where=redact(source), got=str(error)) from error


def _key_lines(text: str, where: str) -> dict[KeyPath, str]:
    """``line 7`` for every key and list item, by its path."""
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _yaml_error(error, where) from error
    if root is None:
        raise ConfigError("this config is empty", where=where, wanted="a YAML mapping such as data: {shards: …}")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            "this config is not a mapping",
            where=where,
            got="a list" if isinstance(root, yaml.SequenceNode) else "a single value",
            wanted="sections such as data: {shards: …}",
        )
    if (num_nodes := _num_nodes(root, {})) > _MAX_NODES:
        raise ConfigError(
            "this config is too large once its aliases are followed",
            where=where,
            got=f"{num_nodes} keys and values",
            wanted=f"at most {_MAX_NODES}",
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
        raise _yaml_error(error, where) from error
    except OmegaConfBaseException as error:
        raise _omegaconf_error(error, where) from error
    assert isinstance(document, DictConfig), "only mappings come this far"
    return document


def _yaml_error(error: yaml.YAMLError, where: str) -> ConfigError:
    if not isinstance(error, yaml.MarkedYAMLError):
        return ConfigError("this config is not YAML", where=where, got=" ".join(str(error).split()))
    if "single document" in (error.context or ""):
        return ConfigError("this config holds several YAML documents", where=where, wanted="one, without a --- between")
    mark = error.problem_mark or error.context_mark
    place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
    return ConfigError("this config is not YAML", where=place, got=error.problem or error.context)


def _omegaconf_error(error: OmegaConfBaseException, where: str) -> ConfigError:
    return ConfigError(
        "this value cannot be resolved",
        where=f"{where}, {error.full_key}" if error.full_key else where,
        got=(error.msg or str(error)).splitlines()[0],
        wanted="${section.key} of this document, or ${oc.env:NAME} of the environment",
    )


def _apply(document: DictConfig, override: str, where: str) -> KeyPath:
    """Sets one key, and says which."""
    key, equals, text = override.partition("=")
    place = f"{where}, override {_echo(override)}"
    if not equals or not all(key.split(".")):
        raise ConfigError("this override does not set a key", where=place, wanted="section.key=value")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        assert isinstance(value, dict), "a dot list makes a mapping"
        _set(document, tuple(key.split(".")), value["value"])
    except yaml.YAMLError as error:
        raise _yaml_error(error, place) from error
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
        models = [inner for field in fields if get_origin(field.annotation) is not tuple for inner in _models_of(field)]
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
            wanted="${section.key} of this document, or ${oc.env:NAME} of the environment",
        )
    if enters_list:
        return ConfigError(
            "this override sets a list item that is not there",
            code="config.override-list-item",
            where=place,
            got=got,
            wanted="the position, from 0, of an item that the document has",
        )
    return ConfigError("this override cannot be applied", code="config.override-refused", where=place, got=got)


def _resolve(document: DictConfig, where: str) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(document, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _omegaconf_error(error, where) from error
    assert isinstance(tree, dict), "only mappings come this far"
    return {str(key): value for key, value in tree.items()}


def _validate(tree: Mapping[str, Any], *, where: str, places: Mapping[KeyPath, str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = _merge([_problem(details, tree) for details in error.errors(include_url=False)])
        raise _config_error(problems, where, places) from error


def _problem(error: ErrorDetails, tree: Mapping[str, Any]) -> _Problem:
    path, context, value = _yaml_path(error["loc"], tree), error.get("ctx", {}), error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = _known_names(error["loc"][:-1])
            return _Problem(path, "unknown key", wanted=", ".join(known), hint=_nearest(str(path[-1]), known))
        case "missing":
            return _Problem((*path, error["loc"][-1]), "missing key", wanted=_missing_description(error["loc"]))
        case "union_tag_invalid":
            known = context["expected_tags"].replace("'", "").split(", ")
            hint = _nearest(str(context["tag"]), known)
            return _Problem((*path, "name"), "unknown loss", repr(context["tag"]), ", ".join(known), hint)
        case "union_tag_not_found":
            return _Problem((*path, "name"), "missing key", wanted=", ".join(_loss_names()))
        case "value_error":
            got, _, wanted = str(context["error"]).partition("; wanted ")
            what = "values that do not go together" if isinstance(value, Mapping) else "wrong value"
            return _Problem(path, what, got, wanted or None)
        case _:
            return _Problem(path, "wrong value", _describe(value), _wanted(error["msg"]))


def _yaml_path(loc: KeyPath, tree: Any) -> KeyPath:
    """Pydantic's location without what is not in the document: names of union members, and the key that is missing."""
    path: list[str | int] = []
    for part in loc:
        children: Any = dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree
        if isinstance(children, Mapping) and part in children:
            tree = children[part]
            path.append(part)
    return tuple(path)


def _merge(problems: Iterable[_Problem]) -> list[_Problem]:
    """One problem a key: a union complains once for every member, deepest last."""
    merged: dict[KeyPath, _Problem] = {}
    for problem in problems:
        first = merged.get(problem.path)
        if first is not None and first.wanted and problem.wanted:
            problem = _Problem(first.path, first.what, first.got, f"{first.wanted} or {problem.wanted}", first.hint)
        merged[problem.path] = problem
    return [problem for path, problem in merged.items() if not any(_is_inside(other, path) for other in merged)]


def _is_inside(path: KeyPath, section: KeyPath) -> bool:
    return len(path) > len(section) and path[: len(section)] == section


def _config_error(problems: Sequence[_Problem], where: str, places: Mapping[KeyPath, str]) -> ConfigError:
    if len(problems) == 1:
        (one,) = problems
        return ConfigError(
            f"{one.what}: {_dotted(one.path)}" if one.path else one.what,
            where=where + _place(one.path, places),
            got=one.got,
            wanted=one.wanted,
            next_step=one.hint,
        )
    listed = "".join(
        f"\n    {_dotted(problem.path)}{_place(problem.path, places)}: {_one_line(problem)}" for problem in problems
    )
    return ConfigError(f"{len(problems)} keys of this config are wrong", where=where, got=listed)


def _one_line(problem: _Problem) -> str:
    details = (
        f"got {problem.got}" if problem.got else None,
        problem.hint or (f"wanted {problem.wanted}" if problem.wanted else None),
    )
    return "; ".join([problem.what, *filter(None, details)])


def _place(path: KeyPath, places: Mapping[KeyPath, str]) -> str:
    """Where the key was written, or what it should stand in; nothing for a tree that was never text."""
    inside = [known for known in places if _is_inside(known, path)]
    around = [path[:length] for length in range(len(path) - 1, 0, -1)]
    return next((f", {places[known]}" for known in (path, *inside, *around) if known in places), "")


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _describe(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    kind = kinds.get(type(value), "a number")
    return kind if value is None or isinstance(value, dict | list) else f"{_echo(value)} ({kind})"


def _echo(value: object) -> str:
    """A value fit for a message: short, and without the credentials that a URL may carry."""
    text = repr(redact_text(value)) if isinstance(value, str) else str(value)
    return text if len(text) <= _ECHO_LENGTH else text[: _ECHO_LENGTH - 1] + "…"


def _wanted(message: str) -> str:
    """Pydantic's own words, in those of a YAML author."""
    wanted = message.removeprefix("Input should be ").split(" or instance of")[0].split(", unable to parse")[0]
    words = {"dictionary": "mapping", "tuple": "list", "string": "text", "boolean": "true or false"}
    plain = wanted.removeprefix("a valid ")
    return words.get(plain, plain)


def _nearest(name: str, known: Sequence[str]) -> str | None:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else None


def _known_names(loc: KeyPath) -> list[str]:
    return [name for model in _models_at(loc) for name in model.model_fields]


def _missing_description(loc: KeyPath) -> str | None:
    fields = [model.model_fields.get(str(loc[-1])) for model in _models_at(loc[:-1])]
    return next((field.description for field in fields if field), None)


def _loss_names() -> list[str]:
    return [name for model in _models_of(Config.model_fields["loss"]) for name in _tags(model)]


def _models_at(loc: KeyPath) -> list[type[BaseModel]]:
    """The sections that a location stands in: one, or several where a union's member was not named."""
    models: list[type[BaseModel]] = [Config]
    for part in loc:
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_of(field)]
        else:
            models = [model for model in models if part in _tags(model)] or models
    return models


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    """The names by which a union tells this section from others."""
    field = model.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _models_of(field: FieldInfo) -> list[type[BaseModel]]:
    return list(_sections(field.annotation))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
