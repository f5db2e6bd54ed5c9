"""Networks that see stored or encoded views: ``views.pixels`` fixes the pixels, so all networks take the same input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.models import InputSpec
from schemas.config import Size, ViewsConfig, size_json, size_text

Input = tuple[Size, str]
"""Size in pixels and interpolation."""


def input_of(spec: InputSpec) -> Input:
    return spec.size, spec.interpolation


def cache_inputs(caches: Sequence[TeacherCache]) -> dict[str, Input]:
    """The input of the teacher of each cache."""
    return {
        f"the teacher of {redact(cache.url)}": (
            cache.header.input_size,
            cache.header.teacher["interpolation"],
        )
        for cache in caches
    }


def check_same_input(plan: ViewsConfig, inputs: Mapping[str, Input]) -> None:
    """
    Args:
        inputs: of all networks, by what they are; the pixels are those of the first.

    Raises:
        ConfigError: the plan fixes the pixels of the views, and a network takes another input.
    """
    (first, expected), *others = inputs.items()
    different = [(name, got) for name, got in others if got != expected]
    if plan.pixels == "none" or not different:
        return
    name, got = different[0]
    raise ConfigError(
        f"views.pixels is {plan.pixels}, so all networks see the same pixels, and {name} takes another input",
        code="config.pixels-input",
        where="views.pixels",
        got=f"{name}: {_text(got)}",
        expected=f"{_text(expected)}, as {first}",
        next_step=f"set student.size={size_json(expected[0])} and student.interpolation={expected[1]}, build a "
        "cache at the student's size and interpolation, or build one with views.pixels=none, which needs the shards in "
        "training",
    )


def _text(network: Input) -> str:
    return f"{size_text(network[0])} pixels, {network[1]}"
