"""The sections of ``Config`` by path: their keys, descriptions and the names of losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.core.yaml_document import KeyPath
from schemas.config import Config


def description(key: str) -> str:
    *parents, name = key.split(".")
    for model in models_at(tuple(parents)):
        field = model.model_fields[name]
        sections = models_of(field)
        listed = f"a list of terms, named {', '.join(loss_names())}"
        return field.description or (sections[0].__doc__ if len(sections) == 1 else None) or listed
    raise AssertionError(f"{key} is not a key of the config")


def known_names(loc: KeyPath) -> list[str]:
    return [name for model in models_at(loc) for name in model.model_fields]


def missing_description(loc: KeyPath) -> str | None:
    fields = [model.model_fields.get(str(loc[-1])) for model in models_at(loc[:-1])]
    return next((field.description for field in fields if field), None)


def loss_names() -> list[str]:
    return [name for model in models_of(Config.model_fields["loss"]) for name in tags(model)]


def models_at(loc: KeyPath) -> list[type[BaseModel]]:
    """The sections that a location stands in: one, or several where a union's member was not named."""
    models: list[type[BaseModel]] = [Config]
    for part in loc:
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in models_of(field)]
        else:
            models = [model for model in models if part in tags(model)] or models
    return models


def tags(model: type[BaseModel]) -> tuple[str, ...]:
    """The names by which a union tells this section from others."""
    field = model.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def models_of(field: FieldInfo) -> list[type[BaseModel]]:
    return list(_sections(field.annotation))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
