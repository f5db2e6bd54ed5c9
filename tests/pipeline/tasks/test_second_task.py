"""A second task, with another kind of target, output and statistic, through the same code as classification."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.cache.build.context import BuildContext
from pipeline.cache.build.header_claim import make_header
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.build.part import BusyTime, PartBuild
from pipeline.cache.format.header import read_header
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import recompute, verify_cache
from pipeline.cache.verify.report import Findings
from pipeline.shards.index import ShardIndex, decode_index, encode_index, index_settings, index_shard
from pipeline.shards.labels import LabelCount
from pipeline.shards.shard_head import read_shard_head
from pipeline.shards.tar import read_samples
from pipeline.shards.writer import pack_shards
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics import (
    METRIC_SETS,
    EvaluationScope,
    Metric,
    MetricSet,
    MetricSums,
    Outputs,
    RowMeans,
)
from pipeline.student.losses import LOSSES, PARAMETERS, Parameter
from pipeline.student.losses.registry import register
from pipeline.student.training.config_checks import check_config, check_plan, check_training
from pipeline.student.training.setup import prepare
from pipeline.student.training.train_step import TrainStep
from pipeline.student.training.trainer import train
from pipeline.tasks import Targets, task_of
from pipeline.teacher.inference import load_teacher
from pipeline.teacher.rendering import GroupViews, Rendering, indexed_samples, read_groups
from schemas.cache_format import ViewBlock, index_schema
from schemas.config import Config, DataConfig, LossSection, ViewsConfig
from tests.errors import raises
from tests.pipeline.cache.verify.forge import replace_commit, republish
from tests.pipeline.caches import TinyCache, cache_section, digit_samples, open_tasks, read_commits, shard_urls
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.shards.tars import data_config, image_bytes, make_tar
from tests.pipeline.student.evaluation.test_evaluator import one_by_one
from tests.pipeline.student.runs import evaluations, run_config, state_of
from tests.pipeline.tasks.second_task import GridPoint, Point

# The schema lists the tasks of the product.
TASK = {"task": Point.name}
DATA = data_config(label="point", num_classes=3).model_copy(update=TASK)
IMAGE = image_bytes("JPEG", size=(40, 30))
MEMBERS = [
    ("a.jpg", IMAGE),
    ("a.point", b"3,100000"),
    ("b.jpg", IMAGE),
    ("bad.jpg", IMAGE[:-20]),
    ("bad.point", b"1,2"),
    ("c.jpg", IMAGE),
    ("c.point", b"0,0"),
]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "points.tar"
    path.write_bytes(make_tar(MEMBERS))
    return path


@pytest.fixture
def index(shard: Path) -> ShardIndex:
    return index_shard(shard, DATA, where="s3://bucket/points.tar")


def points(targets: Targets) -> list[tuple[int, int]]:
    return list(zip(targets["x"].tolist(), targets["y"].tolist(), strict=True))


def test_samples_have_the_tasks_targets(shard: Path) -> None:
    targets = [sample.target for sample in read_samples(shard, DATA, where="x")]
    assert targets == [(3, 100000), None, (1, 2), (0, 0)]


def test_a_target_is_read_from_several_members_in_any_order(shard: Path) -> None:
    members = [("a.y", b"8"), ("a.jpg", IMAGE), ("a.point", b"3,4"), ("b.jpg", IMAGE), ("b.y", b"8"), *MEMBERS[5:]]
    shard.write_bytes(make_tar(members))
    assert [sample.target for sample in read_samples(shard, DATA, where="x")] == [(3, 8), None, (0, 0)]
    head = read_shard_head(str(shard), DATA, size_bytes=shard.stat().st_size)
    assert points(head.targets) == [(3, 8), (-1, -7), (0, 0)]
    shard.write_bytes(make_tar([("a.y", b"up"), ("a.jpg", IMAGE), ("a.point", b"3,4")]))
    with raises("shard.bad-label", where="x, byte 512, after 0 samples", got="'up'", expected="a number in .y"):
        list(read_samples(shard, DATA, where="x"))


def test_an_index_has_the_tasks_columns_and_is_read_back(index: ShardIndex) -> None:
    assert points(index.targets) == [(3, 100000), (-1, -7), (1, 2), (0, 0)]
    assert points(index.ok_targets) == [(3, 100000), (-1, -7), (0, 0)]
    settings = index_settings(DATA)
    assert settings["task"] == Point.name
    encoded = encode_index(index, settings)
    table = pq.read_table(pa.BufferReader(encoded))
    assert table.schema.equals(index_schema({"x": pa.int16(), "y": pa.int64(), "parity": pa.binary(2)}))
    assert table["x"].to_pylist() == [3, None, 1, 0]
    assert table["parity"].to_pylist() == [b"\1\0", None, b"\1\0", b"\0\0"]
    back = decode_index(encoded, where="x", settings=settings)
    assert back.task == index.task == task_of(settings)
    assert points(back.targets) == points(index.targets)
    assert [back.targets[name].dtype for name in ("x", "y", "parity")] == [np.int16, np.int64, np.int8]
    assert back.targets["parity"].tolist() == index.targets["parity"].tolist() == [[1, 0], [-1, -1], [1, 0], [0, 0]]
    assert encode_index(back, settings) == encoded


def test_an_index_of_one_task_is_none_of_another(index: ShardIndex) -> None:
    encoded = encode_index(index, index_settings(DATA))
    with raises("shard.index-settings"):
        decode_index(encoded, where="x", settings=index_settings(data_config(label="point", num_classes=3)))
    with raises("shard.index-damaged"):
        decode_index(encode_index(index, index_settings(data_config())), where="x")


@pytest.mark.parametrize("text", [b"7", b"1,", b"1,1234567890123"], ids=["class", "half", "longer than max_bytes"])
def test_a_member_that_is_no_target_is_refused_in_the_tasks_words(shard: Path, text: bytes) -> None:
    shard.write_bytes(make_tar([("a.jpg", IMAGE), ("a.point", text)]))
    with raises("shard.bad-label", expected="x,y in .point", next_step="write two numbers"):
        list(read_samples(shard, DATA, where="x"))


def test_a_shards_head_counts_targets_of_the_task(shard: Path) -> None:
    head = read_shard_head(str(shard), DATA, size_bytes=shard.stat().st_size)
    assert points(head.targets) == [(3, 100000), (-1, -7), (1, 2), (0, 0)]
    count = LabelCount.of_heads([head], DATA)
    assert (count.num_labelled, count.num_images, count.readable) == (3, 4, ("point",))


def test_views_carry_the_targets_and_a_changed_target_is_found(shard: Path, index: ShardIndex) -> None:
    (group,) = groups(shard, index)
    assert points(group.targets) == points(index.ok_targets)
    # As long as before, so that only this target differs.
    shard.write_bytes(make_tar([(name, b"9,0" if name == "c.point" else data) for name, data in MEMBERS]))
    with raises("shard.changed-since-index"):
        groups(shard, index)


def groups(shard: Path, index: ShardIndex) -> list[GroupViews]:
    rendering = Rendering(
        shard_id="x",
        plan=ViewsConfig(count=1, size=8),
        block=ViewBlock(start=0, stop=1),
        size=8,
        interpolation="bilinear",
        task=task_of(DATA),
        max_pixels=DATA.max_pixels,
    )
    samples = indexed_samples(shard, index, DATA, where="x")
    with ThreadPoolExecutor(1) as pool:
        return list(read_groups(samples, rendering, pool, builder=None))


@pytest.fixture
def context(tiny_config: TinyConfig, tmp_path: Path, request: pytest.FixtureRequest) -> BuildContext:
    """Of a finished cache with two unmixed views of 35 images. Like ``current_context``, for the second task."""
    task_name = getattr(request, "param", Point.name)
    samples = (
        (key, {"png": members["png"], "point": b"%d,%d" % (row, 7 * row)})
        for row, (key, members) in enumerate(digit_samples(35))
    )
    shards = pack_shards(samples, f"{tmp_path}/points-%d.tar", shard_size=20)
    config = tiny_config(
        data={"shards": shards, "label": "point"},
        views={"kind": "crop", "count": 2},
        cache={"class_means": "none", "embeddings": "none"},
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"task": task_name})})
    widths = task_of(config.data).widths
    teacher = load_teacher(config.teacher, widths=widths, size=config.views.size, device=torch.device("cpu"))
    cache = cache_section(config)
    header = make_header(teacher, plan=config.views, cache=cache, data=config.data)
    context = BuildContext(config, cache, teacher, header, None, gpus=None).claimed()
    for number, task in enumerate(open_tasks(context.config)):
        (scratch := tmp_path / f"scratch-{number}").mkdir()
        PartBuild(context, task, scratch, BusyTime()).run()
    publish_manifest(context.cache.url, shard_urls(context.config))
    return context


def test_a_cache_of_another_task_has_its_outputs_and_statistics_and_is_verified(
    context: BuildContext,
) -> None:
    url = context.cache.url
    header, cache = read_header(url), open_cache(url)
    assert task_of(header.data).name == Point.name
    assert [(output.name, output.shape) for output in header.outputs] == [("x", (1,))]
    errors: list[float] = []
    for shard in cache.shards:
        x_N = cache.index(shard).targets["x"]
        for view in range(2):
            columns = cache.view(shard.shard_id, view)
            assert [*columns.outputs] == ["x"]
            errors += np.abs(columns.outputs["x"].decode()[:, 0].astype(np.float64) - x_N).tolist()
    statistics = cache.manifest.statistics
    assert len(errors) == 70
    assert statistics.sums == pytest.approx({"rows": 70, "absolute_error": sum(errors)})
    assert (statistics.labelled, statistics.class_counts, statistics.fidelity_rows > 0) == (0, {}, True)
    report = inspect_cache(url)
    assert (report.teacher_top1, report.outputs) == (None, {"x": "dense [1], 4 bytes a row"})
    assert verify_cache(url).problems == []
    findings = Findings()
    recomputed = recompute(url, context, findings, num_rows=1000, shard_urls={})
    assert (findings.problems, recomputed.rows, recomputed.identical) == ([], 70, 70)
    commit = read_commits(url)[0]
    sums = {**commit.statistics.sums, "absolute_error": commit.statistics.sums["absolute_error"] + 1}
    statistics = commit.statistics.model_copy(update={"sums": sums})
    replace_commit(TinyCache(url, context.config), commit.model_copy(update={"statistics": statistics}))
    republish(TinyCache(url, context.config))
    (problem,) = verify_cache(url).problems
    assert problem.file == commit.part.path


@pytest.mark.parametrize("context", [GridPoint.name], indirect=True)
def test_an_output_of_several_dimensions_is_stored_and_verified(context: BuildContext) -> None:
    url = context.cache.url
    assert inspect_cache(url).outputs == {"x": "dense [1, 1, 1], 4 bytes a row"}
    assert open_cache(url).view("points-0", 1).decoded("x").shape == (20, 1, 1, 1)
    assert verify_cache(url).problems == []
    recomputed = recompute(url, context, Findings(), num_rows=1000, shard_urls={})
    assert (recomputed.rows, recomputed.identical, recomputed.largest_difference) == (70, 70, 0)


class PointLoss(LossSection):
    """The section of a loss that is registered by this module."""

    name: Literal["point"] = "point"


def point(output_B1: Tensor, teacher_x_B1: Tensor, x_B: Tensor) -> Tensor:
    """Squared errors to the teacher and to the target, mean over the rows that have a target."""
    error_B = (output_B1 - teacher_x_B1)[:, 0] ** 2 + (output_B1[:, 0] - x_B) ** 2
    return torch.where(x_B != -1, error_B, 0.0).sum() / (x_B != -1).sum().clamp_min(1)


@pytest.fixture
def training(context: BuildContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """Of a student by this loss from the cache, with rows that may lack a target."""
    register("point")(point)
    for name, parameter in {
        "output_B1": Parameter("student output", "x"),
        "teacher_x_B1": Parameter("teacher output", "x"),
        "x_B": Parameter("target", "x"),
    }.items():
        monkeypatch.setitem(PARAMETERS, name, parameter)
    data = context.config.data.model_copy(update={"task": "classification"})
    base = run_config(context.config.model_copy(update={"data": data}), tmp_path / "run")
    data = base.data.model_copy(update={**TASK, "missing_labels": "ignore"})
    yield base.model_copy(update={"data": data, "loss": (PointLoss(weight=2.0),)})
    del LOSSES["point"]


def test_a_loss_of_the_task_trains_from_its_outputs_and_targets(training: Config) -> None:
    check_config(training)
    setup = prepare(training, DistributedContext())
    (cache,) = setup.spec.caches
    taken: list[dict[str, Tensor]] = []
    setup.student.module.register_forward_hook(lambda _module, _args, student: taken.append(student.outputs))
    before = [weight.clone() for weight in setup.student.module.parameters()]
    batch = setup.dataset[1]
    # As if some samples had no target.
    batch.targets["x"][::3] = -1
    result = TrainStep(setup)(batch)
    errors: list[float] = []
    for row, sample_id in enumerate(batch.sample_ids):
        shard_id, _, key = sample_id.partition("/")
        shard = next(shard for shard in cache.shards if shard.shard_id == shard_id)
        index = cache.index(shard)
        number = index.keys.to_pylist().index(key)
        (teacher_x,) = cache.view(shard_id, 0).outputs["x"].decode()[number].tolist()
        assert batch.targets["y"][row] == index.targets["y"][number]
        assert batch.targets["parity"][row].tolist() == index.targets["parity"][number].tolist()
        output = taken[0]["x"][row, 0].item()
        if row % 3:
            assert batch.targets["x"][row] == index.targets["x"][number]
            errors.append((output - teacher_x) ** 2 + (output - index.targets["x"][number]) ** 2)
    assert result.terms["point"].item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert result.total.item() == pytest.approx(2 * np.mean(errors), rel=1e-5)
    changed = [not torch.equal(*pair) for pair in zip(before, setup.student.module.parameters(), strict=True)]
    assert all(changed)
    setup.close()


def test_a_loss_of_another_task_and_an_output_that_the_cache_lacks_are_refused(
    context: BuildContext, training: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises("loss.other-task", where="loss.0.name", got="ce"):
        check_training(training.model_copy(update={"loss": Config.model_validate({"loss": [{"name": "ce"}]}).loss}))
    # A plan of the cache that the training reads.
    planned = training.model_copy(update={"cache": context.cache})
    check_plan(planned)
    monkeypatch.setitem(PARAMETERS, "teacher_x_B1", Parameter("teacher output", "y"))
    with raises("loss.other-task", where="loss.0.name", got="point, which takes teacher output y"):
        check_plan(planned)
    # An output that a network of the task has, and the cache does not store.
    monkeypatch.setattr(Point, "widths", {"x": 1, "y": 1})
    with raises("cache.no-output"):
        prepare(training, DistributedContext())
    with raises("cache.no-output"):
        check_plan(planned)


class ErrorSums(MetricSums):
    def __init__(self, data: DataConfig, scope: EvaluationScope, device: torch.device) -> None:
        assert (data.label, scope.head_trained, device.type) == ("point", True, "cpu")
        self._means = RowMeans(["x/error"])

    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:
        assert teacher is None
        error_N = (student["x"][:, 0] - torch.from_numpy(targets["x"])).abs()
        self._means.add("x/error", float(error_N.sum()), len(error_N))

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        return self._means.over_ranks(distributed)


ERROR = MetricSet(
    metrics=(Metric(key="x/error", title="error of x", unit="none", higher_is_better=False, needs=("targets",)),),
    selection=("x/error",),
    table=("x/error",),
    sums=ErrorSums,
)


# The schema has no section of this loss.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_training_is_evaluated_and_selects_its_best_checkpoint_by_the_tasks_metric(
    training: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRIC_SETS, Point.name, lambda _: ERROR)
    shards = tuple(shard_urls(training).values())
    data = training.data.model_copy(update={"val_shards": shards})
    train_keys = training.train.model_copy(update={"epochs": 4, "lr": 0.05})
    config = training.model_copy(update={"data": data, "train": train_keys})
    events: list[dict[str, object]] = []
    summary = train(config, report=events.append)
    errors = [line["x/error"] for line in evaluations(tmp_path / "run")]
    assert len(errors) == 4
    # A student that returns 0 has an error of 17.
    assert min(errors) < 14
    assert [event["x/error"] for event in events if event["kind"] == "eval"] == errors
    assert (summary["x/error"], summary["best_x/error"]) == (errors[-1], min(errors))
    state = state_of(tmp_path / "run", "checkpoints/best.pt")
    assert state["best"] == {"metric": "x/error", "value": min(errors)}
    setup = prepare(config, DistributedContext())
    setup.student.module.model.network.load_state_dict(state["model"])
    spec = setup.student.input_spec
    x_N1, target_N = one_by_one(config, setup.student.module.model.eval(), spec, output="x", target="x")
    setup.close()
    assert min(errors) == pytest.approx((x_N1[:, 0] - target_N).abs().mean().item(), rel=1e-5)


def test_a_config_names_the_task_of_its_cache(training: Config) -> None:
    data = training.data.model_copy(update={"task": "classification"})
    loss = Config.model_validate({"loss": [{"name": "kd"}]}).loss
    with raises("cache.other-reading-rules", got="task: point -> classification"):
        prepare(training.model_copy(update={"data": data, "loss": loss}), DistributedContext())
