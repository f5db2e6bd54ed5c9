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
from tests.errors import raises
from tests.jobs.conftest import NETWORK

CONFIGS = Path(jobs.__file__).parent / "configs"


@pytest.mark.parametrize("name", ["demo.yaml", "cifar10.yaml"])
def test_the_recipes_of_one_table_load(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(str(CONFIGS / name), [f"out={tmp_path}"])
    students = {run.student: run.config for run in recipe.runs}
    assert set(students) == {"labels", "kd", "dist++"}
    assert {term.name for term in students["dist++"].loss} == {"ce", "dist", "nd"}
    assert students["kd"].teacher.weights == str(tmp_path / "teacher" / "checkpoints" / "last.pt")
    views = {stage.views.model_dump_json(exclude={"count"}) for stage in [recipe.caches["cache"], *students.values()]}
    assert len(views) == 1


def test_an_error_in_a_student_names_its_stage_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(CONFIGS / "demo.yaml"), [f"out={tmp_path}", "students.kd.loss.0.temprature=3"])
    assert "students.kd" in str(caught.value)
    assert "temperature" in str(caught.value)


def test_a_misspelled_variable_is_refused(tmp_path: Path) -> None:
    with raises("recipe.unreadable", ConfigError) as caught:
        load_recipe(str(CONFIGS / "cifar10.yaml"), [f"out={tmp_path}", "vars.dta=/elsewhere"])
    assert "dta" in str(caught.value.got)
    recipe = load_recipe(str(CONFIGS / "cifar10.yaml"), [f"out={tmp_path}", "vars.data=/elsewhere"])
    assert recipe.caches["cache"].data.shards == "/elsewhere/train-{00000..00009}.tar"


def test_unknown_and_missing_sections_are_reported(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("title: x\nout: y\nteachers: {}\n")
    with raises("recipe.invalid", ConfigError) as caught:
        load_recipe(str(tmp_path / "r.yaml"), [])
    assert "teachers" in str(caught.value.got)
    assert "students" in str(caught.value.got)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("title: !!python/object/apply:os.mkdir [{made}]\n", "config.not-yaml"),
        ("title: [" + "[" * 2000 + "]" * 2001 + "\n", "recipe.unreadable"),
        (
            "vars:\n  a0: &a0 [x]\n"
            + "".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 60)),
            "config.too-large",
        ),
        ("title: x\ntitle: y\n", "config.not-yaml"),
        ("just text\n", "config.not-a-mapping"),
        ("", "config.empty"),
    ],
)
def test_a_recipe_is_parsed_as_strictly_as_a_config(text: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text.replace("{made}", str(tmp_path / "made")))
    with raises(code, ConfigError):
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
cache: {{views: {{count: 2}}, cache: {{logits: fp16, embeddings: fp16}}}}
students:
  fm:
    student: {NETWORK}
    teacher: {{standardize: phi_s}}
    loss: [{{name: kd, temperature: 1.0}}, {{name: mse}}]
    train: {{epochs: 3, global_batch_size: 24}}
""".replace("'", '"')
    )
    recipe = load_recipe(str(recipe_file), [])
    first = run_recipe(recipe)
    metrics = (tmp_path / "out" / "students" / "fm" / "metrics.jsonl").stat().st_mtime_ns
    assert run_recipe(recipe) == first
    assert (tmp_path / "out" / "students" / "fm" / "metrics.jsonl").stat().st_mtime_ns == metrics
    assert write_results(recipe, first).read_text().count("agreement") == 1
    # The recipe computes the moments by which a student standardises its targets.
    assert (tmp_path / "out" / "students" / "fm" / "moments.json").exists()


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


def test_a_grid_has_a_run_for_every_length_and_seed_and_a_student_may_have_another_grid(grid: Path) -> None:
    recipe = load_recipe(str(grid), [])
    assert [(run.student, run.epochs, run.seed) for run in recipe.runs] == [
        *((student, epochs, seed) for student in ("crop", "mixed") for epochs in (1, 2) for seed in (0, 1)),
        ("online", 2, 5),
    ]
    assert all((run.config.train.epochs, run.config.train.seed) == (run.epochs, run.seed) for run in recipe.runs)
    assert len({run.name for run in recipe.runs}) == 9
    assert recipe.runs[-1].name == "online-epochs2-seed5"


def test_a_student_sees_the_views_of_the_cache_it_names_also_online(grid: Path, tmp_path: Path) -> None:
    configs = {run.student: run.config for run in load_recipe(str(grid), []).runs}
    assert {name: config.views.kind for name, config in configs.items()} == {
        "crop": "crop",
        "mixed": "function_matching",
        "online": "function_matching",
    }
    assert configs["mixed"].data.cache == str(tmp_path / "out" / "caches" / "mixed")
    assert configs["online"].data.cache is None


def test_selected_students_need_only_their_caches(grid: Path) -> None:
    recipe = load_recipe(str(grid), ["only=[crop]", "grid.seeds=[7]"])
    assert list(recipe.caches) == ["crop"]
    assert [run.name for run in recipe.runs] == ["crop-epochs1-seed7", "crop-epochs2-seed7"]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("students.crop.cache=crops", "crops"),
        ("only=[cropp]", "cropp"),
        ("grid.epochs=[0]", "grid.epochs"),
        ("students.online.grid.sead=3", "sead"),
        ("cache.cache.logits=fp16", "cache and caches"),
        ("common.student.model=null", "student.model"),
        ("baseline=cropp", "cropp"),
        ("margins.top-1=0.5", "top1, agreement"),
        ("metrics=[accuracy]", "some of top1, top5, "),
        ("metrics=[top1,top1]", "metrics lists top1 twice"),
    ],
)
def test_errors_in_a_grid_are_reported_before_anything_runs(grid: Path, override: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(grid), [override])
    assert text in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "code", "where"),
    [
        # 72 images are 3 steps an epoch, and the grid has lengths of 1 and 2 epochs.
        (["students.crop.train.warmup_steps=3"], "train.warmup-too-long", "crop-epochs1-seed0"),
        (["teacher.train.warmup_steps=900"], "train.warmup-too-long", "teacher"),
        (["students.online.train.global_batch_size=50"], "train.too-many-dropped", "online-epochs2-seed5"),
    ],
)
def test_an_impossible_schedule_is_refused_before_the_first_stage(
    grid: Path, tmp_path: Path, overrides: list[str], code: str, where: str
) -> None:
    recipe = load_recipe(str(grid), ["images=72", *overrides])
    with raises(code, ConfigError) as caught:
        run_recipe(recipe)
    assert str(caught.value.where).startswith(f"{where}: train.")
    assert not (tmp_path / "out").exists()


def test_a_grid_is_trained_once_and_its_results_contain_every_run(grid: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(grid), ["only=[crop,online]"])
    first = run_recipe(recipe)
    runs = json.loads(write_results(recipe, first).read_text())["runs"]
    assert [(run["student"], run["epochs"], run["seed"]) for run in runs] == [
        (run.student, run.epochs, run.seed) for run in recipe.runs
    ]
    summaries = [tmp_path / "out" / "students" / run.name / "summary.json" for run in recipe.runs]
    written = [path.stat().st_mtime_ns for path in summaries]
    assert run_recipe(recipe) == first
    assert [path.stat().st_mtime_ns for path in summaries] == written
    # Another seed trains only the new runs.
    wider = run_recipe(load_recipe(str(grid), ["only=[crop,online]", "grid.seeds=[0,1,2]"]))
    assert len(wider.runs) == len(first.runs) + 2
    assert [path.stat().st_mtime_ns for path in summaries] == written


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_runs_in_parallel_have_the_results_of_runs_in_sequence(grid: Path, tmp_path: Path) -> None:
    overrides = ["only=[crop]", "grid.seeds=[0]"]
    loop = run_recipe(load_recipe(str(grid), overrides))
    parallel = load_recipe(str(grid), [*overrides, f"out={tmp_path / 'tasks'}", "common.ray.address=auto"])
    tasks = run_recipe(parallel)
    assert [run.name for run, _ in tasks.runs] == [run.name for run, _ in loop.runs]
    assert [row.evaluation for _, row in tasks.runs] == [row.evaluation for _, row in loop.runs]


@pytest.mark.slow
def test_a_subset_is_written_and_trained_on(shards: list[str], tmp_path: Path) -> None:
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
    assert recipe.runs[0].config.data.shards == tail
    counts = Counter(sample.target for sample in read_samples(Path(tail), DataConfig(num_classes=10), where=tail))
    assert counts[0] > counts[9] > 0
    steps = len((tmp_path / "out" / "students" / "kd" / "metrics.jsonl").read_text().splitlines())
    assert steps == -(-counts.total() // 8)
