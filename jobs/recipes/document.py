"""Resolves a recipe's document to configs: one for the teacher, one for each cache and one for each training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from pipeline import storage
from pipeline.core.config_loading import build_config, require
from pipeline.core.errors import ConfigError
from pipeline.storage.config_files import read_document
from pipeline.storage.label_files import with_label_files
from pipeline.student.evaluation.metrics import MetricSet, metrics_of
from pipeline.student.run.checkpoint import LAST
from pipeline.tasks import network_keys
from schemas.config import Config, StudentConfig, TeacherConfig
from schemas.recipe import GridConfig, RecipeConfig, Stage

# The name of the cache of a document with the section ``cache``.
_SINGLE_CACHE = "cache"
# Keys of a student in a recipe that no config has.
_RECIPE_KEYS = ("cache", "grid")
# Keys whose mappings are values: they are replaced and not merged.
_MAPPING_VALUES = ("kwargs", "label_map", "resources_per_task")
# A packaged recipe whose shards another command packs.
_DEMO = "demo"
_STUDENT_KEYS = set(StudentConfig.model_fields) - set(TeacherConfig.model_fields)


def packaged() -> dict[str, Path]:
    """The paths of the packaged recipes, by name."""
    paths = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    return {path.stem: path for path in paths if path.stem != _DEMO}


def titles() -> dict[str, str]:
    """The titles of the packaged recipes with their default choices, by name."""
    return {name: str(read_document(str(path)).title) for name, path in packaged().items()}


def _located(source: str) -> str:
    """The path of a packaged recipe, given its name; a path or URL is returned unchanged.

    Raises:
        ConfigError: a bare name that is neither a packaged recipe nor a file.
    """
    recipes = packaged()
    if source in recipes:
        return str(recipes[source])
    if "/" in source or PurePath(source).suffix or Path(source).exists():
        return source
    next_step = "stillroom demo" if source == _DEMO else "stillroom recipe --list"
    for name in get_close_matches(source, recipes, n=1):
        next_step = f"stillroom recipe {name}"
    raise ConfigError(
        "no recipe has this name",
        code="recipe.unknown-name",
        where="RECIPE",
        got=source,
        expected=f"one of {', '.join(recipes)}; or a YAML file or URL",
        next_step=next_step,
    )


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One training: a student for a number of epochs with a seed."""

    student: str
    epochs: int
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """The last part of its run's URL."""
        assert self.config.run is not None
        return self.config.run.url.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The configs of a recipe. Their outputs are ``{out}/teacher``, ``{out}/cache`` or ``{out}/caches/NAME``, and
    ``{out}/students/RUN``.

    Attributes:
        teacher: the teacher's training; for an existing teacher, a config that names it.
        caches: builds by name.
        runs: trainings of students.
    """

    document: RecipeConfig
    out: Path
    teacher: Config
    caches: dict[str, Config]
    runs: tuple[RunSpec, ...]

    @property
    def trains_teacher(self) -> bool:
        return self.teacher.student is not None

    @property
    def metrics(self) -> MetricSet:
        """Those of the students, with the columns that the document names."""
        metrics = metrics_of((self.runs[0].config if self.runs else self.teacher).data)
        return metrics if self.document.metrics is None else replace(metrics, table=self.document.metrics)

    def published(self, name: str) -> str | None:
        """The published number of a student or of ``teacher``: ``70.66 %``."""
        number = self.document.published.get(name)
        return None if number is None else f"{number:.2f} {self.metrics.main.scale.symbol}".rstrip()


def load_recipe(source: str, overrides: list[str]) -> Recipe:
    """Reads, overrides, resolves and checks a recipe. Opens none of its shards, weights and caches.

    Args:
        source: the name of a packaged recipe, or the path or URL of a document.

    Raises:
        ConfigError: there is no such recipe, the document is not a recipe, or the config of a stage is invalid; the
            error names the stage.
    """
    source = _located(source)
    try:
        tree = read_document(source)
        if "vars" in tree:
            # An override of a misspelled variable fails, instead of adding a variable.
            OmegaConf.set_struct(tree["vars"], True)
        tree.merge_with_dotlist(overrides)
        document = RecipeConfig.model_validate(OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))
    except ValidationError as error:
        raise _invalid(error, source) from error
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        raise ConfigError(
            "this recipe cannot be read", code="recipe.unreadable", where=source, got=str(error)
        ) from error
    return _Resolver(document, source, Path(storage.absolute(document.out))).recipe()


def _invalid(error: ValidationError, where: str) -> ConfigError:
    problems = [
        f"{'.'.join(map(str, problem['loc'])) or 'the document'}: {problem['msg']}"
        for problem in error.errors(include_url=False)
    ]
    return ConfigError(
        "these are not the sections of a recipe",
        code="recipe.invalid",
        where=where,
        got="; ".join(problems),
        expected=", ".join(RecipeConfig.model_fields),
    )


@dataclass(frozen=True, slots=True)
class _Resolver:
    """Merges the sections of a document into the configs of its stages."""

    document: RecipeConfig
    source: str
    out: Path

    def recipe(self) -> Recipe:
        teacher, teacher_section = self._teacher()
        names = self.document.only or tuple(self.document.students)
        caches = {name: self._cache(name, stage, teacher_section) for name, stage in self._cache_stages(names).items()}
        runs = tuple(run for name in names for run in self._runs(name, teacher_section))
        if teacher.student is not None:
            self._check_training("teacher", teacher)
        for run in runs:
            self._check_training(f"students.{run.student}", run.config)
        for name, config in caches.items():
            self._require(self._cache_section(name), config, "data.shards", "teacher.model")
        recipe = Recipe(self.document, self.out, teacher, caches, runs)
        metrics = recipe.metrics
        self._check_metrics("metrics", metrics.table, [metric.key for metric in metrics.metrics])
        self._check_metrics("margins", self.document.margins, metrics.table)
        return recipe

    def _check_metrics(self, key: str, named: Iterable[str], metrics: Sequence[str]) -> None:
        if unknown := sorted(set(named) - set(metrics)):
            raise ConfigError(
                "the table of this recipe has no such metric",
                code="recipe.unknown-metric",
                where=f"{self.source}: {key}",
                got=", ".join(unknown),
                expected=f"some of {', '.join(metrics)}",
            )

    def _teacher(self) -> tuple[Config, Stage]:
        """The teacher's config, and the section ``teacher`` of the stages that use this teacher."""
        stage = self.document.teacher
        given = stage.get("teacher", {})
        if "weights" not in given:
            base = {"run": {"url": str(self.out / "teacher")}, "ray": {"address": "none"}, "teacher": {"mode": "none"}}
            config = self._stage("teacher", base, stage)
            require(config, "student.model", command="a recipe that names no teacher.weights", section="teacher.")
            assert config.student is not None
            network = config.student.model_dump(mode="json", exclude_unset=True, exclude=_STUDENT_KEYS)
            return config, {**network, "weights": str(self.out / "teacher" / LAST)}
        common = self.document.common
        network = {**common.get("student", {}), **stage.get("student", {}), **given}
        section = {key: value for key, value in network.items() if key not in _STUDENT_KEYS}
        base = {key: value for key, value in common.items() if key != "student"}
        return self._config("teacher", base, {"teacher": section}), section

    def _cache_stages(self, students: tuple[str, ...]) -> dict[str, Stage]:
        """The stages of the caches that these students learn from."""
        if self.document.cache is not None:
            return {_SINGLE_CACHE: self.document.cache}
        expected = {self._cache_of(name) for name in students if self._mode(name) == "cache"}
        return {name: stage for name, stage in self.document.caches.items() if name in expected}

    def _cache(self, name: str, stage: Stage, teacher: Stage) -> Config:
        base = {"teacher": teacher, "cache": {"url": self._cache_url(name)}}
        return self._stage(self._cache_section(name), base, stage)

    def _cache_section(self, cache: str) -> str:
        """The section of a cache in the document, for messages."""
        return _SINGLE_CACHE if self.document.cache is not None else f"caches.{cache}"

    def _cache_url(self, name: str) -> str:
        return str(self.out / "cache" if self.document.cache is not None else self.out / "caches" / name)

    def _runs(self, name: str, teacher: Stage) -> Iterator[RunSpec]:
        stage = self.document.students[name]
        section = {key: value for key, value in stage.items() if key not in _RECIPE_KEYS}
        data = {"cache": self._cache_url(self._cache_of(name))} if self._mode(name) == "cache" else {}
        for folder, train in self._run_variants(name, stage):
            base = {"teacher": teacher, "data": data, "run": {"url": str(self.out / "students" / folder)}}
            config = self._stage(f"students.{name}", self._cache_data(name), base, section, {"train": train})
            yield RunSpec(name, config.train.epochs, config.train.seed, config)

    def _run_variants(self, name: str, stage: Stage) -> Iterator[tuple[str, dict[str, int]]]:
        """The folder of each run of a student, and its keys of the section ``train``."""
        if self.document.grid is None and "grid" not in stage:
            yield name, {}
            return
        grid = self._grid(name, stage)
        for epochs, seed in product(grid.epochs or (None,), grid.seeds):
            length = "" if epochs is None else f"-epochs{epochs}"
            yield f"{name}{length}-seed{seed}", {**({} if epochs is None else {"epochs": epochs}), "seed": seed}

    def _grid(self, name: str, stage: Stage) -> GridConfig:
        shared = {} if self.document.grid is None else self.document.grid.model_dump()
        try:
            return GridConfig.model_validate({**shared, **stage.get("grid", {})})
        except ValidationError as error:
            raise _invalid(error, f"{self.source}: students.{name}.grid") from error

    def _mode(self, name: str) -> str:
        return self.document.students[name].get("teacher", {}).get("mode", "cache")

    def _cache_of(self, name: str) -> str:
        """The cache that a student names, from which it takes the teacher's outputs or at least the views."""
        if self.document.cache is not None:
            return _SINGLE_CACHE
        cache = self.document.students[name].get("cache")
        if cache not in self.document.caches:
            raise ConfigError(
                "a student names a cache that the recipe does not have",
                code="recipe.unknown-cache",
                where=f"{self.source}: students.{name}.cache",
                got=cache,
                expected=f"one of {', '.join(self.document.caches)}" if self.document.caches else "a section caches",
            )
        return str(cache)

    def _cache_data(self, name: str) -> Stage:
        """The shards and views of the cache that a student names, which it uses also with an online teacher."""
        if self.document.cache is None and "cache" not in self.document.students[name]:
            return {}
        stage = self.document.cache or self.document.caches[self._cache_of(name)]
        views = {key: value for key, value in stage.get("views", {}).items() if key != "count"}
        return {"data": stage.get("data", {}), "views": views}

    def _check_training(self, where: str, config: Config) -> None:
        """Every training needs validation shards for its row of the table."""
        self._require(where, config, "student.model", "loss", "data.val_shards")

    def _require(self, where: str, config: Config, *keys: str) -> None:
        """Also the keys of the task. Missing keys of ``data`` are reported for the section ``common``, since all stages
        share them."""
        command, keys = f"the stage {where} of {self.source}", (*keys, *network_keys(config.data))
        require(config, *(key for key in keys if key.startswith("data.")), command=command, section="common.")
        require(config, *(key for key in keys if not key.startswith("data.")), command=command, section=f"{where}.")

    def _stage(self, where: str, *parts: Mapping[str, Any]) -> Config:
        return self._config(where, self.document.common, *parts)

    def _config(self, where: str, *parts: Mapping[str, Any]) -> Config:
        return with_label_files(build_config(_merged(*parts), where=f"{self.source}: {where}"))


def _merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Merges sections; later values win, and lists and mappings that are values are replaced."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            below = merged.get(key)
            if isinstance(below, Mapping) and isinstance(value, Mapping) and key not in _MAPPING_VALUES:
                value = _merged(below, value)
            merged[str(key)] = value
    return merged
