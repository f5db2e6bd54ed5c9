"""Recipes: every stage is checked before the first one runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import jobs
from jobs.recipe import load_recipe, run_recipe, write_results
from pipeline.errors import ConfigError
from tests.jobs.conftest import NETWORK

CONFIGS = Path(jobs.__file__).parent / "configs"


@pytest.mark.parametrize("name", ["demo.yaml", "cifar10.yaml"])
def test_every_recipe_of_the_project_loads(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(str(CONFIGS / name), [f"out={tmp_path}"])
    assert set(recipe.students) == {"labels", "kd", "dist++"}
    assert {term.name for term in recipe.students["dist++"].loss} == {"ce", "dist", "nd"}
    assert recipe.students["kd"].teacher.weights == str(tmp_path / "teacher" / "checkpoints" / "last.pt")
    views = {stage.views.model_dump_json(exclude={"count"}) for stage in [recipe.cache, *recipe.students.values()]}
    assert len(views) == 1


def test_a_mistake_in_one_student_is_named_with_its_stage_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"students\.kd") as caught:
        load_recipe(str(CONFIGS / "demo.yaml"), [f"out={tmp_path}", "students.kd.loss.0.temprature=3"])
    assert "temperature" in str(caught.value)


def test_a_mistyped_variable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dta"):
        load_recipe(str(CONFIGS / "cifar10.yaml"), [f"out={tmp_path}", "vars.dta=/elsewhere"])
    recipe = load_recipe(str(CONFIGS / "cifar10.yaml"), [f"out={tmp_path}", "vars.data=/elsewhere"])
    assert recipe.cache.data.shards == "/elsewhere/train-{00000..00009}.tar"


def test_unknown_and_missing_sections_are_told(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("title: x\nout: y\nteachers: {}\n")
    with pytest.raises(ConfigError, match="teachers") as caught:
        load_recipe(str(tmp_path / "r.yaml"), [])
    assert "students" in str(caught.value)


def test_a_recipe_run_twice_trains_nothing_the_second_time(shards: list[str], tmp_path: Path) -> None:
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(
        f"""
title: tiny
out: {tmp_path}/out
common:
  data: {{shards: {shards}, val_shards: {shards}, num_classes: 10}}
  views: {{kind: function_matching, size: 16, mix_group: 8}}
  ray: {{address: none}}
teacher: {{student: {NETWORK}, loss: [{{name: ce}}], train: {{global_batch_size: 24}}}}
cache: {{views: {{count: 2}}, cache: {{logits: fp16}}}}
students:
  fm: {{student: {NETWORK}, loss: [{{name: kd, temperature: 1.0}}], train: {{epochs: 3, global_batch_size: 24}}}}
""".replace("'", '"')
    )
    recipe = load_recipe(str(recipe_file), [])
    first = run_recipe(recipe)
    metrics = (tmp_path / "out" / "students" / "fm" / "metrics.jsonl").stat().st_mtime_ns
    assert run_recipe(recipe) == first
    assert (tmp_path / "out" / "students" / "fm" / "metrics.jsonl").stat().st_mtime_ns == metrics
    assert write_results(recipe, first).read_text().count("agreement") == 1
