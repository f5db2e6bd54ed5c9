"""A recipe's document as checked stages: one config each for the teacher, every cache and every cell of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from pipeline.student.run.checkpoint import LAST
from schemas.config import Config, StudentConfig, TeacherConfig
from schemas.recipe import GridConfig, RecipeConfig, Stage

_THE_CACHE = "cache"
_OF_RECIPE = ("cache", "grid")
_VALUES = ("kwargs", "resources_per_task")
# It needs shards that another command packs.
_OF_DEMO = "demo"
_NEXT_STEPS = {_OF_DEMO: "stillroom demo"}
_OF_STUDENTS = set(StudentConfig.model_fields) - set(TeacherConfig.model_fields)


def packaged() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    found = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))}
    return {name: path for name, path in found.items() if name != _OF_DEMO}


def titles() -> dict[str, str]:
    """What each of them prints above its table, with its default choices."""
    return {name: str(read_document(str(path)).title) for name, path in packaged().items()}


def _located(source: str) -> str:
    """The path of a packaged recipe for its name; any path or URL as it is.

    Raises:
        ConfigError: a bare name that is neither a packaged recipe nor a file.
    """
    recipes = packaged()
    if source in recipes:
        return str(recipes[source])
    if "/" in source or PurePath(source).suffix or Path(source).exists():
        return source
    close = get_close_matches(source, recipes, n=1)
    raise ConfigError(
        "no recipe has this name",
        code="recipe.unknown-name",
        where="RECIPE",
        got=source,
        expected=f"one of {', '.join(recipes)}; or a YAML file or URL",
        next_step=f"stillroom recipe {close[0]}" if close else _NEXT_STEPS.get(source, "stillroom recipe --list"),
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
    """One config a stage. ``{out}/teacher``, ``{out}/cache`` or ``{out}/caches/NAME``, and ``{out}/students/CELL``
    hold what they make.

    Attributes:
        teacher: its training; of a teacher that is there, the section that names it.
    """

    document: RecipeConfig
    out: Path
    teacher: Config
    caches: dict[str, Config]
    specs: tuple[RunSpec, ...]

    @property
    def trains_teacher(self) -> bool:
        return self.teacher.student is not None


def load_recipe(source: str, overrides: list[str]) -> Recipe:
    """Reads, overrides, resolves and checks a recipe. Touches nothing that it names.

    Args:
        source: the name of a packaged recipe, or the path or URL of a document.

    Raises:
        ConfigError: there is no such recipe, the document is none of a recipe, or a stage says what no config may say;
            the stage is named.
    """
    source = _located(source)
    try:
        tree = read_document(source)
        if "vars" in tree:
            # A mistyped variable would otherwise be a new one that nothing reads.
            OmegaConf.set_struct(tree["vars"], True)
        tree.merge_with_dotlist(overrides)
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        document = RecipeConfig.model_validate(plain)
    except ValidationError as error:
        raise _refused(error, source) from error
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        raise ConfigError("this recipe cannot be read", where=source, got=str(error)) from error
    return _Reading(document, source, Path(storage.absolute(document.out))).recipe()


def _refused(error: ValidationError, source: str) -> ConfigError:
    problems = [
        f"{'.'.join(map(str, problem['loc'])) or 'the document'}: {problem['msg']}"
        for problem in error.errors(include_url=False)
    ]
    return ConfigError(
        "these are not the sections of a recipe",
        where=source,
        got="; ".join(problems),
        expected=", ".join(RecipeConfig.model_fields),
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    """A document on its way to stages."""

    document: RecipeConfig
    source: str
    out: Path

    def recipe(self) -> Recipe:
        teacher, said = self._teacher()
        names = self.document.only or tuple(self.document.students)
        caches = {name: self._cache(name, stage, said) for name, stage in self._cache_stages(names).items()}
        specs = tuple(spec for name in names for spec in self._specs(name, said))
        if teacher.student is not None:
            self._check_training("teacher", teacher)
        for spec in specs:
            self._check_training(f"students.{spec.student}", spec.config)
        for name, config in caches.items():
            self._require(self._path_of(name), config, "data.shards", "data.num_classes", "teacher.model")
        return Recipe(self.document, self.out, teacher, caches, specs)

    def _teacher(self) -> tuple[Config, Stage]:
        """The stage, and the network it ends with as the teacher section of the stages after it."""
        stage = self.document.teacher
        given = stage.get("teacher", {})
        if "weights" not in given:
            made = {"run": {"url": str(self.out / "teacher")}, "ray": {"address": "none"}, "teacher": {"mode": "none"}}
            config = self._stage("teacher", made, stage)
            require(config, "student.model", command="a recipe that names no teacher.weights", section="teacher.")
            assert config.student is not None
            said = config.student.model_dump(mode="json", exclude_unset=True, exclude=_OF_STUDENTS)
            return config, {**said, "weights": str(self.out / "teacher" / LAST)}
        common = self.document.common
        network = {**common.get("student", {}), **stage.get("student", {}), **given}
        said = {key: value for key, value in network.items() if key not in _OF_STUDENTS}
        others = {key: value for key, value in common.items() if key != "student"}
        return self._checked("teacher", _merged(others, {"teacher": said})), said

    def _cache_stages(self, students: tuple[str, ...]) -> dict[str, Stage]:
        """The stages of the caches that these students learn from."""
        if self.document.cache is not None:
            return {_THE_CACHE: self.document.cache}
        expected = {self._cache_of(name) for name in students if self._mode(name) == "cache"}
        return {name: stage for name, stage in self.document.caches.items() if name in expected}

    def _cache(self, name: str, stage: Stage, said: Stage) -> Config:
        made = {"teacher": said, "cache": {"url": self._cache_url(name)}}
        return self._stage(self._path_of(name), made, stage)

    def _path_of(self, cache: str) -> str:
        """The section of a cache in the document."""
        return _THE_CACHE if self.document.cache is not None else f"caches.{cache}"

    def _cache_url(self, name: str) -> str:
        return str(self.out / "cache" if self.document.cache is not None else self.out / "caches" / name)

    def _specs(self, name: str, said: Stage) -> Iterator[RunSpec]:
        stage = self.document.students[name]
        own = {key: value for key, value in stage.items() if key not in _OF_RECIPE}
        below = self._seen_by(name)
        cache = {"cache": self._cache_url(self._cache_of(name))} if self._mode(name) == "cache" else {}
        for run, train in self._runs(name, stage):
            made = {"teacher": said, "data": cache, "run": {"url": str(self.out / "students" / run)}}
            config = self._stage(f"students.{name}", _merged(below, made), own, {"train": train})
            yield RunSpec(name, config.train.epochs, config.train.seed, config)

    def _runs(self, name: str, stage: Stage) -> Iterator[tuple[str, dict[str, int]]]:
        """The run's folder of each cell, and what its train section differs in."""
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
            raise _refused(error, f"{self.source}: students.{name}.grid") from error

    def _mode(self, name: str) -> str:
        return self.document.students[name].get("teacher", {}).get("mode", "cache")

    def _cache_of(self, name: str) -> str:
        """The cache that a student names: it learns from it, or at least sees its views."""
        if self.document.cache is not None:
            return _THE_CACHE
        named = self.document.students[name].get("cache")
        if named not in self.document.caches:
            raise ConfigError(
                "a student names a cache that the recipe does not have",
                where=f"{self.source}: students.{name}.cache",
                got=named,
                expected=f"one of {', '.join(self.document.caches)}" if self.document.caches else "a section caches",
            )
        return str(named)

    def _seen_by(self, name: str) -> Stage:
        """What a student shares with the cache it names, also where its teacher is online: shards and views."""
        if self.document.cache is None and "cache" not in self.document.students[name]:
            return {}
        stage = self.document.cache or self.document.caches[self._cache_of(name)]
        views = {key: value for key, value in stage.get("views", {}).items() if key != "count"}
        return {"data": stage.get("data", {}), "views": views}

    def _check_training(self, where: str, config: Config) -> None:
        """Every training ends in a row of the table, which is measured on the validation shards."""
        self._require(where, config, "student.model", "loss", "data.num_classes", "data.val_shards")

    def _require(self, where: str, config: Config, *keys: str) -> None:
        """The data are of all stages, so a key of theirs is wanted in the common section first."""
        command = f"the stage {where} of {self.source}"
        require(config, *(key for key in keys if key.startswith("data.")), command=command, section="common.")
        require(config, *(key for key in keys if not key.startswith("data.")), command=command, section=f"{where}.")

    def _stage(self, where: str, *parts: Mapping[str, Any]) -> Config:
        return self._checked(where, _merged(self.document.common, *parts))

    def _checked(self, where: str, tree: dict[str, Any]) -> Config:
        return build_config(tree, where=f"{self.source}: {where}")


def _merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Later keys win; sections are merged, and lists and mappings that are values are replaced."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            below = merged.get(key)
            if isinstance(below, Mapping) and isinstance(value, Mapping) and key not in _VALUES:
                value = _merged(below, value)
            merged[str(key)] = value
    return merged
