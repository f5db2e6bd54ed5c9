"""Several heads: labels from JSON to the index and the statistics of a cache, against loops over the same JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.shards.index import decode_index, encode_index, index_settings, index_shard
from pipeline.shards.tar import read_samples
from pipeline.tasks import BadTargetError, task_of
from pipeline.tasks.head_targets import BitsColumn
from schemas.config import CacheConfig, DataConfig
from tests.errors import raises
from tests.pipeline.cache.verify.forge import replace_commit, republish
from tests.pipeline.caches import TinyCache, cache_section, read_commits
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.heads import HEADS, build_heads, document_of, heads_config
from tests.pipeline.shards.tars import image_bytes, make_tar

DATA = DataConfig.model_validate({"task": "heads", "label": "json", "heads": HEADS})
IMAGE = image_bytes("JPEG", size=(40, 30))
DOCUMENTS: list[dict[str, Any] | None] = [
    {"pair": 9, "even": 1, "tags": [0, 10], "other": "x"},
    {"pair": None, "even": 0, "tags": []},
    {},
    None,
    {"tags": [8]},
]


def tar_of(path: Path, documents: list[dict[str, Any] | None]) -> Path:
    members: list[tuple[str, bytes]] = []
    for row, document in enumerate(documents):
        members.append((f"{row}.jpg", IMAGE))
        if document is not None:
            members.append((f"{row}.json", json.dumps(document).encode()))
    path.write_bytes(make_tar(members))
    return path


def bits(classes: list[int], num_classes: int) -> bytes:
    """Class k is bit k mod 8 of byte k div 8."""
    values = bytearray(-(-num_classes // 8))
    for k in classes:
        values[k // 8] |= 1 << (k % 8)
    return bytes(values)


def test_labels_are_read_from_json_and_stored_by_head(tmp_path: Path) -> None:
    shard = tar_of(tmp_path / "a.tar", DOCUMENTS)
    assert [sample.target for sample in read_samples(shard, DATA, where="x")] == [
        (1, 9, (0, 10)),
        (0, None, ()),
        None,
        None,
        (None, None, (8,)),
    ]
    index, settings = index_shard(shard, DATA, where=str(shard)), index_settings(DATA)
    encoded = encode_index(index, settings)
    table = pq.read_table(pa.BufferReader(encoded))
    assert table["label_pair"].to_pylist() == [9, None, None, None, None]
    assert table["label_even"].to_pylist() == [1, 0, None, None, None]
    assert table["label_tags"].to_pylist() == [bits([0, 10], 11), bits([], 11), None, None, bits([8], 11)]
    assert table.schema.field("label_even").type == pa.int32()
    back = decode_index(encoded, where=str(shard), settings=settings)
    assert back.task == index.task == task_of(DATA) == task_of(settings)
    assert encode_index(back, settings) == encoded
    tags_NK = back.targets["label_tags"]
    assert tags_NK.dtype == np.int8
    assert [None if row[0] < 0 else np.flatnonzero(row).tolist() for row in tags_NK] == [[0, 10], [], None, None, [8]]
    assert back.task.has_target(back.targets).tolist() == [True, True, False, False, True]
    rows, classes = back.task.class_ids(back.targets)
    # The classes of pair follow the two of even.
    assert list(zip(rows.tolist(), classes.tolist(), strict=True)) == [(0, 1), (0, 11), (1, 0)]


@given(
    st.integers(2, 40).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.sets(st.integers(0, k - 1)) | st.none())))
)
def test_bits_are_those_of_the_format_and_are_read_back(drawn: tuple[int, list[set[int] | None]]) -> None:
    num_classes, rows = drawn
    column = BitsColumn("x", pa.binary(-(-num_classes // 8)), -1, num_classes)
    values_NK = np.zeros((len(rows), num_classes), np.int8)
    for row, classes in enumerate(rows):
        values_NK[row, sorted(classes or ())] = 1
        if classes is None:
            values_NK[row] = -1
    stored = column.to_arrow(values_NK)
    assert stored.to_pylist() == [None if row is None else bits(sorted(row), num_classes) for row in rows]
    assert np.array_equal(column.to_numpy(pa.chunked_array([stored])), values_NK)


def test_a_spare_bit_is_an_invalid_target() -> None:
    task = task_of(DataConfig.model_validate({"task": "heads", "label": "json", "heads": {"tags": HEADS["tags"]}}))
    stored = pa.chunked_array([pa.array([bits([2], 11), bits([2, 11], 16), None], pa.binary(2))])
    (column,) = task.columns
    assert task.num_invalid({column.name: column.to_numpy(stored)}) == 1


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b'{"pair": 10}', "pair"),
        (b'{"pair": -1}', "pair"),
        (b'{"pair": true}', "pair"),
        (b'{"pair": "three"}', "pair"),
        (b'{"pair": 3.0}', "pair"),
        (b'{"even": [0]}', "even"),
        (b'{"tags": 3}', "tags"),
        (b'{"tags": [1, 1]}', "tags"),
        (b'{"tags": [11]}', "tags"),
        (b"[3]", "even"),
        (b"3", "even"),
        (b'{"pair": ', "even"),
        (b"\xff", "even"),
    ],
)
def test_a_label_that_is_none_is_refused_with_its_field(tmp_path: Path, text: bytes, field: str) -> None:
    with pytest.raises(BadTargetError) as raised:
        task_of(DATA).parse({"json": text})
    assert (raised.value.member, f" in {field} " in raised.value.expected) == ("json", True)
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar([("a.jpg", IMAGE), ("a.json", text)]))
    with raises("shard.bad-label"):
        list(read_samples(path, DATA, where="x"))


def test_fields_of_an_object_in_the_json_are_read() -> None:
    data = DATA.model_copy(update={"label": "Meta.JSON:a.b"})
    task = task_of(data)
    assert task.members == ("meta.json",)
    target = (None, 3, (1, 2))
    assert task.parse({"meta.json": b'{"pair": 1, "a": {"b": {"pair": 3, "tags": [2, 1]}}}'}) == target
    assert task.parse({"meta.json": b'{"a": {"b": 7}}'}) is None
    assert task.parse(task.encode(target)) == target
    assert task.is_target(b'{"a": 1}')
    assert not task.is_target(b"1")


@pytest.mark.parametrize(
    "data",
    [
        {"task": "heads", "label": "json"},
        {"heads": HEADS},
        {"task": "heads", "label": "json", "heads": HEADS, "num_classes": 10},
        {"task": "heads", "heads": HEADS},
        {"task": "heads", "label": "json:", "heads": HEADS},
        {"task": "heads", "label": None, "heads": HEADS},
        {"task": "heads", "label": "json", "heads": {"Pair": {"num_classes": 3}}},
        {"task": "heads", "label": "json", "heads": {"a/b": {"num_classes": 3}}},
        {"task": "heads", "label": "json", "heads": {"a": {"num_classes": 1}}},
    ],
)
def test_a_data_section_that_contradicts_itself_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate(data)


@pytest.mark.parametrize("kind", ["topk:3", "sampled:3@1"])
def test_a_part_of_the_classes_is_not_stored_of_a_multilabel_head(kind: str) -> None:
    cache = CacheConfig(url="x", logits=kind)
    task = task_of(DATA)
    with raises("config.multilabel-topk"):
        task.outputs(cache, task.widths)
    outputs = task.outputs(cache, {"logits.pair": 10, "embedding": 4})
    assert [(output.name, output.kind) for output in outputs] == [("logits.pair", kind), ("embedding", "none")]


@pytest.fixture(params=["fp32", "int8"])
def cache(tiny_config: TinyConfig, tmp_path: Path, request: pytest.FixtureRequest) -> TinyCache:
    """Of two unmixed views of 30 images."""
    views = {"kind": "crop", "count": 2}
    return build_heads(heads_config(tiny_config(), tmp_path, views=views, logits=request.param, class_means="view0"))


def test_a_cache_has_the_outputs_and_statistics_of_each_head_and_is_verified(cache: TinyCache) -> None:
    opened = open_cache(cache.url)
    names = [(output.name, output.shape) for output in opened.header.outputs]
    assert names == [("logits.even", (2,)), ("logits.pair", (10,)), ("logits.tags", (11,)), ("embedding", (7,))]
    sums = opened.manifest.statistics.sums
    documents = [document_of(row) for row in range(30)]
    pairs = [document["pair"] for document in documents if "pair" in document]
    assert sums["pair/labelled"] == 2 * len(pairs)
    assert {k: sums.get(f"pair/classes/{k}", 0) for k in range(10)} == {k: 2 * pairs.count(k) for k in range(10)}
    assert (sums["even/labelled"], sums["even/classes/0"], sums["even/classes/1"]) == (60, 30, 30)
    tags = [tag for document in documents for tag in document["tags"] or ()]
    assert sums["tags/labelled"] == 2 * sum(document["tags"] is not None for document in documents)
    assert {k: sums.get(f"tags/classes/{k}", 0) for k in range(11)} == {k: 2 * tags.count(k) for k in range(11)}
    assert verify_cache(cache.url).problems == []
    if cache_section(cache.config).logits == "fp32":
        expected = dict.fromkeys(("pair/top1_hits", "even/top1_hits", "tags/true_positives", "tags/false_positives"), 0)
        row = 0
        for shard in opened.shards:
            views = [opened.view(shard.shard_id, view) for view in range(2)]
            for position in range(shard.num_ok):
                document = documents[row]
                for view in views:
                    for head in ("pair", "even"):
                        scores = view.decoded(f"logits.{head}")[position].tolist()
                        expected[f"{head}/top1_hits"] += document.get(head) == scores.index(max(scores))
                    for tag, score in enumerate(view.decoded("logits.tags")[position].tolist()):
                        if document["tags"] is not None and score > 0:
                            expected[f"tags/{'true' if tag in document['tags'] else 'false'}_positives"] += 1
                row += 1
        assert {key: sums.get(key, 0) for key in expected} == expected
    report = inspect_cache(cache.url)
    assert report.teacher.split(", ", 1)[1].startswith("even 2, pair 10, tags 11 classes, ")
    metrics = report.teacher_metrics
    assert list(metrics) == ["even top-1", "pair top-1", "pair top-5", "tags micro F1"]
    assert metrics["pair top-1"] == sums["pair/top1_hits"] / sums["pair/labelled"]


@pytest.mark.parametrize(
    "key", ["pair/top1_hits", "even/labelled", "tags/labelled", "tags/classes/3", "tags/true_positives"]
)
def test_a_commit_with_other_statistics_is_found(cache: TinyCache, key: str) -> None:
    commit = read_commits(cache.url)[0]
    sums = {**commit.statistics.sums, key: commit.statistics.sums.get(key, 0) + 40}
    statistics = commit.statistics.model_copy(update={"sums": sums})
    replace_commit(cache, commit.model_copy(update={"statistics": statistics}))
    republish(cache)
    assert {problem.file for problem in verify_cache(cache.url).problems} == {commit.part.path}
