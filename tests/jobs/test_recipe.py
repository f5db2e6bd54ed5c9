"""Recipes: every stage is checked before the first one runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import jobs
from jobs.recipe import load_recipe, run_recipe, write_results
from pipeline.core.errors import ConfigError
from pipeline.shards.tar import read_samples
from schemas.config import DataConfig
from tests.jobs.conftest import NETWORK

CONFIGS = Path(jobs.__file__).parent / "configs"


@pytest.mark.parametrize("name", ["demo.yaml", "cifar10.yaml"])
def test_the_recipes_of_one_table_load(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(str(CONFIGS / name), [f"out={tmp_path}"])
    students = {spec.student: spec.config for spec in recipe.specs}
    assert set(students) == {"labels", "kd", "dist++"}
    assert {term.name for term in students["dist++"].loss} == {"ce", "dist", "nd"}
    assert students["kd"].teacher.weights == str(tmp_path / "teacher" / "checkpoints" / "last.pt")
    views = {stage.views.model_dump_json(exclude={"count"}) for stage in [recipe.caches["cache"], *students.values()]}
    assert len(views) == 1


def test_a_mistake_in_one_student_is_named_with_its_stage_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"students\.kd") as caught:
        load_recipe(str(CONFIGS / "demo.yaml"), [f"out={tmp_path}", "students.kd.loss.0.temprature=3"])
    assert "temperature" in str(caught.value)


def test_a_mistyped_variable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dta"):
        load_recipe(str(CONFIGS / "cifar10.yaml"), [f"out={tmp_path}", "vars.dta=/elsewhere"])
    recipe = load_recipe(str(CONFIGS / "cifar10.yaml"), [f"out={tmp_path}", "vars.data=/elsewhere"])
    assert recipe.caches["cache"].data.shards == "/elsewhere/train-{00000..00009}.tar"


def test_unknown_and_missing_sections_are_told(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("title: x\nout: y\nteachers: {}\n")
    with pytest.raises(ConfigError, match="teachers") as caught:
        load_recipe(str(tmp_path / "r.yaml"), [])
    assert "students" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title: !!python/object/apply:os.mkdir [{made}]\n", "could not determine a constructor for the tag"),
        ("title: [" + "[" * 2000 + "]" * 2001 + "\n", "cannot be read"),
        (
            "vars:\n  a0: &a0 [x]\n"
            + "".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 60)),
            "too large once its aliases",
        ),
        ("title: x\ntitle: y\n", "title"),
        ("just words\n", "not a mapping"),
        ("", "empty"),
    ],
)
def test_a_recipe_is_read_as_carefully_as_a_config(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text.replace("{made}", str(tmp_path / "made")))
    with pytest.raises(ConfigError, match=said):
        load_recipe(str(tmp_path / "r.yaml"), [])
    assert not (tmp_path / "made").exists()


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


GRID = """
title: tiny
out: {out}
common:
  data: {{shards: {shards}, val_shards: {shards}, num_classes: 10}}
  views: {{size: 16, mix_group: 8}}
  student: {network}
  ray: {{address: none}}
teacher: {{views: {{kind: crop}}, loss: [{{name: ce}}], train: {{global_batch_size: 24}}}}
caches:
  crop: {{views: {{kind: crop, count: 2}}, cache: {{logits: fp16}}}}
  mixed: {{views: {{kind: function_matching, count: 3}}, cache: {{logits: fp16}}}}
grid: {{epochs: [1, 2], seeds: [0, 1]}}
students:
  crop: &student {{cache: crop, loss: [{{name: kd}}], train: {{global_batch_size: 24}}}}
  mixed: {{<<: *student, cache: mixed}}
  online: {{<<: *student, cache: mixed, teacher: {{mode: online}}, grid: {{epochs: [2], seeds: [5]}}}}
"""


@pytest.fixture
def grid(shards: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID.format(out=tmp_path / "out", shards=shards, network=NETWORK).replace("'", '"'))
    return path


def test_a_grid_has_a_cell_for_every_length_and_seed_and_a_student_may_have_its_own(grid: Path) -> None:
    recipe = load_recipe(str(grid), [])
    assert [(spec.student, spec.epochs, spec.seed) for spec in recipe.specs] == [
        *((student, epochs, seed) for student in ("crop", "mixed") for epochs in (1, 2) for seed in (0, 1)),
        ("online", 2, 5),
    ]
    assert all((spec.config.train.epochs, spec.config.train.seed) == (spec.epochs, spec.seed) for spec in recipe.specs)
    assert len({spec.name for spec in recipe.specs}) == 9
    assert recipe.specs[-1].name == "online-epochs2-seed5"


def test_a_student_sees_the_views_of_the_cache_it_names_also_online(grid: Path, tmp_path: Path) -> None:
    found = {spec.student: spec.config for spec in load_recipe(str(grid), []).specs}
    assert {name: config.views.kind for name, config in found.items()} == {
        "crop": "crop",
        "mixed": "function_matching",
        "online": "function_matching",
    }
    assert found["mixed"].data.cache == str(tmp_path / "out" / "caches" / "mixed")
    assert found["online"].data.cache is None


def test_only_some_students_need_only_their_caches(grid: Path) -> None:
    recipe = load_recipe(str(grid), ["only=[crop]", "grid.seeds=[7]"])
    assert list(recipe.caches) == ["crop"]
    assert [spec.name for spec in recipe.specs] == ["crop-epochs1-seed7", "crop-epochs2-seed7"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("students.crop.cache=crops", "crops"),
        ("only=[cropp]", "cropp"),
        ("grid.epochs=[0]", r"grid\.epochs"),
        ("students.online.grid.sead=3", "sead"),
        ("cache.cache.logits=fp16", "cache and caches"),
        ("common.student.model=null", r"student\.model"),
    ],
)
def test_mistakes_in_a_grid_are_told_before_anything_runs(grid: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_recipe(str(grid), [override])


@pytest.mark.slow
def test_a_grid_is_trained_once_and_its_results_hold_every_cell(grid: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(grid), ["only=[crop,online]"])
    first = run_recipe(recipe)
    told = json.loads(write_results(recipe, first).read_text())
    assert [(spec["student"], spec["epochs"], spec["seed"]) for spec in told["cells"]] == [
        (spec.student, spec.epochs, spec.seed) for spec in recipe.specs
    ]
    runs = [tmp_path / "out" / "students" / spec.name / "summary.json" for spec in recipe.specs]
    written = [path.stat().st_mtime_ns for path in runs]
    assert run_recipe(recipe) == first
    assert [path.stat().st_mtime_ns for path in runs] == written
    # A seed more trains only the new cells.
    wider = run_recipe(load_recipe(str(grid), ["only=[crop,online]", "grid.seeds=[0,1,2]"]))
    assert len(wider.specs) == len(first.specs) + 2
    assert [path.stat().st_mtime_ns for path in runs] == written


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_cells_as_tasks_come_to_what_a_loop_comes_to(grid: Path, tmp_path: Path) -> None:
    overrides = ["only=[crop]", "grid.seeds=[0]"]
    loop = run_recipe(load_recipe(str(grid), overrides))
    beside = load_recipe(str(grid), [*overrides, f"out={tmp_path / 'tasks'}", "common.ray.address=auto"])
    tasks = run_recipe(beside)
    assert [spec.name for spec, _ in tasks.specs] == [spec.name for spec, _ in loop.specs]
    assert [row.evaluation for _, row in tasks.specs] == [row.evaluation for _, row in loop.specs]


@pytest.mark.slow
def test_a_subset_is_written_and_learnt_from(shards: list[str], tmp_path: Path) -> None:
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(
        f"""
title: tiny
out: {tmp_path}/out
subsets: {{tail: {{shards: {shards}, imbalance: 4, shard_size: 1000}}}}
common:
  data: {{shards: {shards}, val_shards: {shards}, num_classes: 10}}
  views: {{kind: crop, size: 16, mix_group: 8}}
  ray: {{address: none}}
teacher: {{student: {NETWORK}, loss: [{{name: ce}}], train: {{global_batch_size: 24}}}}
caches: {{tail: {{data: {{shards: "${{out}}/shards/tail-00000.tar"}}, cache: {{logits: fp16}}}}}}
students:
  kd: {{cache: tail, student: {NETWORK}, loss: [{{name: kd}}], train: {{global_batch_size: 8, tail: short}}}}
""".replace("'", '"')
    )
    recipe = load_recipe(str(recipe_file), [])
    run_recipe(recipe)
    tail = str(tmp_path / "out" / "shards" / "tail-00000.tar")
    assert recipe.specs[0].config.data.shards == tail
    counts = Counter(sample.label for sample in read_samples(Path(tail), DataConfig(num_classes=10), where=tail))
    assert counts[0] > counts[9] > 0
    steps = len((tmp_path / "out" / "students" / "kd" / "metrics.jsonl").read_text().splitlines())
    assert steps == -(-counts.total() // 8)
