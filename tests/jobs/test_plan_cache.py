"""The plan of a build against the build itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.build_cache import build_cache
from jobs.plan_cache import describe, report
from pipeline.core.errors import StorageInputError
from pipeline.models.cifar import resnet
from tests.errors import raises
from tests.jobs.conftest import Tree, config_of, files_below


def test_a_plan_writes_nothing_and_counts_rows_and_steps(tree: Tree, tmp_path: Path) -> None:
    plan = report(config_of(tree()), measured=False)
    assert files_below(tmp_path) == {}
    text = describe(plan)
    assert "96 in 4 shards (counted)" in text
    assert "384 forwards, 384 still to do" in text
    assert "students x epochs > 4; with train.epochs=2 from 3 students on" in text
    assert "4 steps of 24 rows, 0 rows dropped" in text


def test_a_plan_counts_the_views_of_an_epoch(tree: Tree) -> None:
    one, two = (
        report(config_of(tree(train={"global_batch_size": 24, "epochs": 2, "views_per_image": k})), measured=False)
        for k in (1, 2)
    )
    assert "students x epochs x 2 views > 4; with train.epochs=2 from 2 students on" in describe(two)
    assert "8 steps of 24 rows (2 views of each image), 0 rows dropped" in describe(two)
    # The second view of each of 4 shards: its rows, the footer of its part, and the index.
    assert two.plan.traffic.epoch.get - one.plan.traffic.epoch.get == 4 * 3


@pytest.mark.usefixtures("built_cache")
def test_a_finished_cache_leaves_nothing_to_do(tree: Tree) -> None:
    plan = report(config_of(tree()), measured=False)
    assert (plan.plan.work.num_parts, plan.plan.work.num_parts_open) == (12, 0)
    assert plan.plan.size.parts_open.high == 0
    assert [warning.partition(":")[0] for warning in plan.warnings] == ["teacher.weights is random"]


def test_a_missing_part_is_planned_again_although_a_commit_names_it(tree: Tree, built_cache: Path) -> None:
    next(built_cache.glob("parts/digits-02/v0000-0001.*")).unlink()
    assert report(config_of(tree()), measured=False).plan.work.forwards_open.expected == 24 * 2


@pytest.mark.parametrize(
    ("tail", "text"), [("short", "5 steps of 20 rows, the last of 16"), ("drop", "training would fail")]
)
def test_the_last_step_of_an_epoch_is_described(tree: Tree, tail: str, text: str) -> None:
    config = config_of(tree(train={"global_batch_size": 20, "tail": tail}))
    assert text in describe(report(config, measured=False))


@pytest.mark.slow
def test_a_measured_plan_has_rate_bytes_and_hours_and_writes_nothing(tree: Tree, tmp_path: Path) -> None:
    plan = report(config_of(tree()), measured=True)
    measured, times = plan.measurement, plan.forecast
    assert measured is not None
    assert times is not None
    assert files_below(tmp_path) == {}
    assert (measured.num_images, measured.num_views) == (16, 2)
    stages = measured.stages
    assert min(stages.decode_s, stages.forward_s, measured.load_s) > 0
    # One task, 384 rows; two views are decoded at once as they are in a part.
    assert times.build_s == pytest.approx(384 * measured.row_s + 12 * measured.fetch_s)
    assert times.size_bytes == pytest.approx(384 * measured.row_bytes)
    assert "a part takes" in describe(plan)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_sample_is_measured_as_a_ray_task_for_all_slots_of_the_cluster(tree: Tree) -> None:
    plan = report(config_of(tree(ray={"address": "local", "cpus_per_task": 1})), measured=True)
    assert plan.forecast is not None
    assert plan.forecast.num_slots == 2


def test_a_build_that_cannot_fit_stops_before_it_writes(tree: Tree, tmp_path: Path) -> None:
    views = {"count": 65_535, "size": 16}
    config = config_of(tree(views=views, data={"num_classes": 10**12}, cache={"class_means": "none"}))
    with raises("storage.not-enough-room", StorageInputError):
        build_cache(config)
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize(
    ("num_classes", "teacher", "expected"),
    [
        (10, {}, []),
        (7, {}, ["fc.weight (7, 8) for (10, 8)"]),
        (10, {"sha256": "0" * 64}, ["sha256"]),
        (None, {}, ["teacher.weights", "no such file"]),
        (10, {"model": "timm/resnet5O"}, ["resnet50"]),
    ],
    ids=["fit", "other classes", "other file", "no file", "no model"],
)
def test_a_plan_reads_the_weights_and_compares_them_with_the_network(
    num_classes: int | None, teacher: dict[str, object], expected: list[str], tree: Tree, tmp_path: Path
) -> None:
    weights = tmp_path / "teacher.pt"
    if num_classes is not None:
        torch.save(resnet(num_classes=num_classes, depth=8, widths=(4, 4, 6, 8)).state_dict(), weights)
    # Without class means and embeddings a plan needs no width of the teacher.
    config = config_of(tree(teacher={"weights": str(weights), **teacher}, cache={"class_means": "none"}))
    warnings = [warning for warning in report(config, measured=False).warnings if "a build would fail" in warning]
    assert len(warnings) == bool(expected)
    for text in expected:
        assert text in warnings[0]
