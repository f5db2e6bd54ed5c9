"""The document of ``stillroom recipe``: an experiment whose stages are parts of a config."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from schemas.config import Section, local_path

Stage = dict[str, Any]
"""A part of a config. It is checked after the parts are merged."""

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Margin = Annotated[float, Field(gt=0)]


class GridConfig(Section):
    """Every student is trained for each number of epochs with each seed. Each such run is one entry of the results."""

    epochs: tuple[Count, ...] | None = Field(
        None, min_length=1, description="Values of train.epochs; null: that of the stage."
    )
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="Values of train.seed.")


class LongTailConfig(Section):
    """A long-tailed subset: the share of class k of K that it has falls exponentially with k (Cao 2019)."""

    shards: str | tuple[str, ...] = Field(description="Source shards: URL with braces, or a list.")
    imbalance: float = Field(ge=1, description="Images of the largest class over those of the smallest.")
    seed: int = Field(0, ge=0, description="Determines the images of the subset.")
    shard_size: int = Field(1000, ge=1, description="Images in one written shard.")


class RecipeConfig(Section):
    """One document, one table."""

    title: str = Field(description="Printed above the table.")
    out: str = Field(description="Folder of all outputs of the recipe.")
    vars: dict[str, Any] = Field(
        default_factory=dict, description="Values and choices of the recipe, for ${vars.name}."
    )
    images: int | None = Field(
        None, ge=1, description="Number of training images, which gives the steps of trainings before any runs."
    )
    published: dict[str, float] = Field(
        default_factory=dict,
        description="Values of the main metric by name (teacher or a student's), from the paper; shares in per cent.",
    )
    subsets: dict[str, LongTailConfig] = Field(
        default_factory=dict, description="Written first, as out/shards/NAME-00000.tar and so on."
    )
    common: Stage = Field(default_factory=dict, description="Keys of all stages.")
    teacher: Stage = Field(description="A training, or a teacher section with the weights of an existing teacher.")
    cache: Stage | None = Field(None, description="The build of a single cache.")
    caches: dict[str, Stage] = Field(default_factory=dict, description="Builds of several, by name.")
    students: dict[str, Stage] = Field(
        min_length=1, description="Trainings by name, with the keys of a config and also cache (a name) and grid."
    )
    only: tuple[str, ...] | None = Field(None, min_length=1, description="The students to train; null: all.")
    grid: GridConfig | None = Field(None, description="Lengths and seeds of all students.")
    baseline: str | dict[str, str | tuple[str, ...]] | None = Field(
        None,
        description="The student that all others are compared with; or by student the name or names of its baselines.",
    )
    metrics: tuple[str, ...] | None = Field(
        None, min_length=1, description="Columns of the tables, by the keys of metrics; null: those of the task."
    )
    margins: dict[str, Margin] = Field(
        default_factory=dict,
        description="By metric, differences below this do not matter: set before the trainings, for shares in points.",
    )

    @field_validator("out")
    @classmethod
    def _check_out(cls, out: str) -> str:
        return local_path(out, key="out")

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, metrics: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if repeated := sorted({key for key in metrics or () if (metrics or ()).count(key) > 1}):
            raise ValueError(f"metrics lists {', '.join(repeated)} twice")
        return metrics

    @model_validator(mode="after")
    def _check_names(self) -> RecipeConfig:
        if self.cache is not None and self.caches:
            raise ValueError("cache and caches are both given; expected one of them")
        unknown = sorted(set(self.only or ()) - set(self.students))
        if unknown:
            raise ValueError(f"only names {', '.join(unknown)}; expected some of {', '.join(self.students)}")
        return self

    @model_validator(mode="after")
    def _check_baselines(self) -> RecipeConfig:
        names = set(self.baseline) if isinstance(self.baseline, dict) else set[str]()
        unknown = sorted((names | {name for pair in self.compared for name in pair}) - set(self.students))
        if unknown:
            raise ValueError(f"baseline names {', '.join(unknown)}; expected some of {', '.join(self.students)}")
        equal = [student for student, baseline in self.compared if student == baseline]
        if equal:
            raise ValueError(f"baseline compares {', '.join(equal)} with itself")
        return self

    @property
    def compared(self) -> list[tuple[str, str]]:
        """Each student with each of its baselines."""
        if self.baseline is None:
            return []
        if isinstance(self.baseline, str):
            return [(name, self.baseline) for name in self.students if name != self.baseline]
        by_student = {key: (names,) if isinstance(names, str) else names for key, names in self.baseline.items()}
        return [(student, name) for student, names in by_student.items() for name in names]
