"""A whole experiment from one YAML: train a teacher, cache its outputs, train students, print one table.

``stillroom recipe RECIPE [key=value …] [--dry-run]``. Every stage is an ordinary config that resumes, so a repeated
run does only the missing work.
"""

from __future__ import annotations

import time
from pathlib import Path

from jobs.build_cache import build_cache, describe
from jobs.cache_moments import compute
from jobs.entry import config_command
from jobs.observability.log import emit
from jobs.ray.cluster import cluster
from jobs.recipes.document import Recipe, load_recipe, titles
from jobs.recipes.runs import Row, can_run_in_parallel, train_and_evaluate, train_in_parallel
from jobs.recipes.schedule import check_schedules, describe_plan
from jobs.recipes.table import Results, print_tables, read_results, write_results
from pipeline.shards.long_tail import write_long_tail
from pipeline.shards.shard_urls import shard_urls
from schemas.config import Config, DataConfig

DRY_RUN = "--dry-run"


def run_recipe(recipe: Recipe) -> Results:
    """Writes the subsets, trains the teacher, builds the caches, trains and evaluates the students.

    Raises:
        StillroomError: a stage fails; the schedule of a student fails before the first stage, if the document gives the
            number of images.
    """
    check_schedules(recipe)
    _write_subsets(recipe)
    teacher = _train_teacher(recipe)
    with cluster(recipe.runs[0].config.ray):
        for config in recipe.caches.values():
            assert config.cache is not None
            emit(f"2/3 teacher cache: {config.cache.url}", event="stage")
            emit(describe(build_cache(config), config.data), event="stage")
            if any(_standardizes(run.config, config.cache.url) for run in recipe.runs):
                compute(config.cache.url, config.ray)
        return Results(teacher, tuple(zip(recipe.runs, _train_students(recipe), strict=True)))


def _standardizes(config: Config, cache_url: str) -> bool:
    named = (section.moments for section in config.teacher.models.values())
    return config.teacher.standardizes and cache_url in (*config.data.caches, *named)


def _write_subsets(recipe: Recipe) -> None:
    data = DataConfig.model_validate(recipe.document.common.get("data", {}))
    for name, tail in recipe.document.subsets.items():
        pattern = str(recipe.out / "shards" / f"{name}-%05d.tar")
        subset = write_long_tail(shard_urls(tail.shards, key=f"subsets.{name}.shards"), pattern, tail, data)
        emit(
            f"subset {name}: {sum(subset.counts)} images in {len(subset.urls)} shards, by class {subset.counts}",
            event="stage",
        )


def _train_teacher(recipe: Recipe) -> Row | None:
    if not recipe.trains_teacher:
        emit(f"1/3 teacher: {recipe.teacher.teacher.model}, {recipe.teacher.teacher.weights}", event="stage")
        return None
    emit(f"1/3 teacher: {recipe.out / 'teacher'}", event="stage")
    return train_and_evaluate(recipe.teacher)


def _train_students(recipe: Recipe) -> list[Row]:
    if can_run_in_parallel(recipe.runs):
        emit(f"3/3 students: {len(recipe.runs)} trainings, several at once", event="stage")
        return train_in_parallel(recipe.runs)
    rows: list[Row] = []
    for number, run in enumerate(recipe.runs, start=1):
        emit(f"3/3 student {number} of {len(recipe.runs)}: {run.name}", event="stage")
        rows.append(train_and_evaluate(run.config))
    return rows


def run_and_report(source: str, overrides: list[str]) -> Path:
    """Runs a recipe, prints its tables, and returns the path of ``results.json``."""
    recipe = load_recipe(source, overrides)
    # A damaged file of results fails the recipe before its first stage.
    read_results(recipe)
    path = write_results(recipe, run_recipe(recipe))
    print_tables(recipe, read_results(recipe))
    return path


def describe_packaged() -> str:
    """The text of ``--list``."""
    recipes = titles()
    width = max(map(len, recipes), default=0)
    return "\n".join(f"{name:<{width}}  {title}" for name, title in recipes.items())


def main(source: str, overrides: list[str]) -> None:
    if DRY_RUN in overrides:
        print(describe_plan(load_recipe(source, [text for text in overrides if text != DRY_RUN])))
        return
    began = time.monotonic()
    path = run_and_report(source, overrides)
    emit(f"{path} written after {time.monotonic() - began:.0f} s", event="end")


if __name__ == "__main__":
    config_command("recipe", main, option=DRY_RUN)
