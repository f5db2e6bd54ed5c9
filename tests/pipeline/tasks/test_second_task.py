"""A second task, with another kind of target, through the same code as classification."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline.shards.index import ShardIndex, decode_index, encode_index, index_settings, index_shard
from pipeline.shards.labels import LabelCount
from pipeline.shards.shard_head import read_shard_head
from pipeline.shards.tar import read_samples
from pipeline.tasks import (
    TASKS,
    BadTargetError,
    OutputSpec,
    Recount,
    StatisticsAccumulator,
    TargetColumn,
    Targets,
    Task,
    task_of,
)
from pipeline.teacher.rendering import GroupViews, Rendering, indexed_samples, read_groups
from schemas.cache_format import Statistics, ViewBlock, index_schema
from schemas.config import CacheConfig, DataConfig, ViewsConfig
from tests.errors import raises
from tests.pipeline.shards.tars import data_config, image_bytes, make_tar

NAME = "point"
_POINT = re.compile(rb"(\d+),(\d+)")


class Point(Task):
    """The position of one point in an image, ``x,y`` in pixels. It is trained by no loss and counted nowhere."""

    name = NAME
    member_content = "x,y as text"
    max_bytes = 12
    columns = (TargetColumn("x", pa.int16(), -1), TargetColumn("y", pa.int64(), -7))
    statistics_fields = ()

    def settings(self, data: DataConfig) -> dict[str, Any]:
        return {"label": self.member(data)}

    def member(self, data: DataConfig) -> str | None:
        return data.label

    def parse(self, text: bytes, data: DataConfig) -> tuple[int, int]:  # noqa: ARG002
        if (point := self.try_parse(text)) is None:
            raise BadTargetError("x,y", next_step="write two numbers")
        return point

    def try_parse(self, text: bytes) -> tuple[int, int] | None:
        match = _POINT.fullmatch(text)
        return None if match is None else (int(match[1]), int(match[2]))

    def encode(self, target: tuple[int, int]) -> bytes:
        return b"%d,%d" % target

    def rows(self, targets: Iterable[tuple[int, int] | None]) -> dict[str, NDArray[Any]]:
        point_N2 = np.array([(-1, -7) if point is None else point for point in targets], np.int64).reshape(-1, 2)
        return {"x": point_N2[:, 0].astype(np.int16), "y": point_N2[:, 1].copy()}

    def has_target(self, targets: Targets) -> NDArray[np.bool_]:
        return targets["y"] != -7

    def num_invalid(self, targets: Targets, *, num_classes: int) -> int:
        raise NotImplementedError

    def outputs(self, cache: CacheConfig, *, num_classes: int, embedding_dim: int) -> tuple[OutputSpec, ...]:
        raise NotImplementedError

    def is_output(self, name: str) -> bool:
        raise NotImplementedError

    def accumulate(self) -> StatisticsAccumulator:
        raise NotImplementedError

    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> Recount:
        raise NotImplementedError

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        raise NotImplementedError


TASKS[Point.name] = Point()
# The schema lists the tasks of the product.
DATA = data_config(label="point", num_classes=3).model_copy(update={"task": NAME})
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
POINTS = [(3, 100000), None, (1, 2), (0, 0)]


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
    assert [sample.target for sample in read_samples(shard, DATA, where="x")] == POINTS


def test_an_index_has_the_tasks_columns_and_is_read_back(index: ShardIndex) -> None:
    assert points(index.targets) == [(3, 100000), (-1, -7), (1, 2), (0, 0)]
    assert points(index.ok_targets) == [(3, 100000), (-1, -7), (0, 0)]
    settings = index_settings(DATA)
    assert settings["task"] == NAME
    encoded = encode_index(index, settings)
    assert encode_index(index, settings) == encoded
    table = pq.read_table(pa.BufferReader(encoded))
    assert table.schema.equals(index_schema({"x": pa.int16(), "y": pa.int64()}))
    assert table["x"].to_pylist() == [3, None, 1, 0]
    back = decode_index(encoded, where="x", settings=settings)
    assert back.task is index.task is task_of(settings)
    assert points(back.targets) == points(index.targets)
    assert [back.targets[name].dtype for name in ("x", "y")] == [np.int16, np.int64]
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
