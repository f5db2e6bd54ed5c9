"""Domains of samples: where they are read, their column of the index, and the statistics of a cache by domain."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from jobs.cache_ops import describe_cache
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.ops.relabel import relabel
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.shards.index import decode_index, encode_index, index_settings, index_shard
from pipeline.shards.shard_head import read_shard_head
from pipeline.shards.writer import pack_shards
from pipeline.tasks import BadTargetError, Task, task_of
from pipeline.tasks.domains import WithDomain
from schemas.cache_format import Statistics
from schemas.config import DataConfig
from tests.errors import raises
from tests.pipeline.cache.verify.forge import replace_commit, republish
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples, read_commits
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.domains import CAMERAS, camera_of, cameras_config, pack_cameras

CLASSES = DataConfig.model_validate({"num_classes": 10})


def data_with(domain: str | dict[str, str], base: DataConfig = CLASSES) -> DataConfig:
    return DataConfig.model_validate({**base.model_dump(exclude_unset=True), "domain": domain})


@pytest.mark.parametrize(
    ("domain", "texts", "expected"),
    [
        ("json:camera", {"json": b'{"camera": "north"}'}, "north"),
        ("json:camera", {"json": b'{"camera": 3}'}, "3"),
        ("json:camera", {"json": b'{"camera": null}'}, None),
        ("json:camera", {"json": b'{"camera": " "}'}, None),
        ("json:camera", {"json": b"{}"}, None),
        ("json:camera", {}, None),
        ("meta.json:a.b", {"meta.json": b'{"a": {"b": "north"}}'}, "north"),
        ("meta.json:a.b", {"meta.json": b'{"a": 3}'}, None),
        ("camera.txt", {"camera.txt": b"north\n"}, "north"),
        ("camera.txt", {"camera.txt": b"\n"}, None),
    ],
)
def test_a_domain_is_a_member_or_a_field_of_one_and_may_be_missing(
    domain: str, texts: dict[str, bytes], expected: str | None
) -> None:
    task = task_of(data_with(domain))
    for label, column in ((b"7", 7), (None, -1)):
        members = texts if label is None else {**texts, "cls": label}
        for parse in (task.parse, task.try_parse):
            rows = task.rows([parse(members)])
            assert (rows["label"].tolist(), rows["domain"].tolist()) == ([column], [expected])
    if expected is not None:
        assert task.parse(task.encode((7, expected))) == (7, expected)


@pytest.mark.parametrize(
    "text", [b"[]", b"x", b'{"camera": true}', b'{"camera": [1]}', b'{"camera": "%s"}' % (257 * b"x")]
)
def test_other_values_are_no_domain(text: bytes) -> None:
    task = task_of(data_with("json:camera"))
    with pytest.raises(BadTargetError) as caught:
        task.parse({"json": text, "cls": b"7"})
    assert (caught.value.member, caught.value.what) == ("json", "domain")
    assert task.try_parse({"json": text, "cls": b"7"}) == (7, None)


@pytest.mark.parametrize("domain", ["json", "meta.JSON", "", "a b", "cls:camera", "json:", {}, {"north-*": " "}])
def test_a_setting_that_names_no_domain_is_refused(domain: str | dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"domain": domain})


def test_a_shard_has_the_domain_of_its_most_specific_pattern() -> None:
    task = task_of(data_with({"cam-*": "north", "cam-1*": "south", "cam-12": "east"}))
    of_shard = {
        shard: task.of_shard(shard).rows([(7, None), None])["domain"].tolist()
        for shard in ("cam-0", "cam-11", "cam-12", "other")
    }
    assert of_shard == {"cam-0": ["north"] * 2, "cam-11": ["south"] * 2, "cam-12": ["east"] * 2, "other": [None] * 2}


def test_heads_and_domain_may_be_fields_of_one_member() -> None:
    heads = {"pair": {"num_classes": 3}}
    data = DataConfig.model_validate({"task": "heads", "label": "json", "heads": heads, "domain": "json:camera"})
    task = task_of(data)
    target = task.parse({"json": b'{"pair": 2, "camera": "north"}'})
    rows = task.rows([target])
    assert (rows["label_pair"].tolist(), rows["domain"].tolist()) == ([2], ["north"])
    assert json.loads(task.encode(target)["json"]) == {"pair": 2, "camera": "north"}


def test_a_long_member_is_no_label_though_domains_may_be_long() -> None:
    task, plain = task_of(data_with("json:camera")), task_of(CLASSES)
    text = b"7" + b" " * plain.max_bytes
    with pytest.raises(BadTargetError) as caught:
        task.parse({"cls": text, "json": b"{}"})
    assert caught.value.member == "cls"
    assert not task.is_target(text)


def test_every_property_and_method_of_a_task_is_that_of_its_base() -> None:
    """A member that ``Task`` implements, and this class does not, would hide the one of the base."""
    missing = {name for name in vars(Task) if not name.startswith("_")} - vars(WithDomain).keys()
    assert missing == set()


def test_an_index_has_a_column_of_domains_only_where_the_config_names_them(tmp_path: Path) -> None:
    (path, _) = map(Path, pack_cameras(tmp_path))
    data = data_with("json:meta.camera")
    index = index_shard(path, data, where=str(path))
    assert index.targets["domain"].tolist() == [camera_of(row) for row in range(20)]
    encoded = encode_index(index, index_settings(data))
    stored = decode_index(encoded, where="here", settings=index_settings(data))
    assert stored.targets["domain"].tolist() == index.targets["domain"].tolist()
    assert encode_index(stored, index_settings(data)) == encoded
    plain = index_shard(path, CLASSES, where=str(path))
    assert [*plain.targets] == ["label"]
    assert "domain" not in index_settings(CLASSES)
    head = read_shard_head(str(path), data, size_bytes=path.stat().st_size)
    assert head.targets["domain"].tolist() == index.targets["domain"].tolist()
    by_shard = data_with({path.stem: "north"})
    index = index_shard(path, by_shard, where=str(path))
    stored = decode_index(encode_index(index, index_settings(by_shard)), where="here")
    assert {*stored.targets["domain"]} == {"north"}
    assert stored.task.rows([None])["domain"].tolist() == ["north"]


def test_an_invalid_domain_in_a_shard_is_refused(tmp_path: Path) -> None:
    (key, members), *_ = digit_samples(1)
    (url,) = pack_shards([(key, {**members, "json": b'{"camera": []}'})], f"{tmp_path}/bad-%d.tar", shard_size=1)
    with raises("shard.bad-domain", got="'{\"camera\": []}'"):
        index_shard(Path(url), data_with("json:camera"), where=url)


def test_more_domains_than_a_cache_summarises_are_refused() -> None:
    task = task_of(data_with("json:camera"))
    targets = {"label": np.zeros(101, np.int32), "domain": np.array([str(row) for row in range(101)], object)}
    outputs = {"logits": np.zeros((101, 10), np.float32)}
    first = {name: rows[:100] for name, rows in targets.items()}
    task.accumulate().add({"logits": outputs["logits"][:100]}, first)
    with raises("data.too-many-domains"):
        task.accumulate().add(outputs, targets)


@pytest.fixture
def cache(tiny_config: TinyConfig, tmp_path: Path) -> TinyCache:
    """Of two unmixed views of 30 images, in two shards."""
    config = cameras_config(tiny_config(), tmp_path, views={"kind": "crop", "count": 2}, cache={"class_means": "view0"})
    build(config)
    return TinyCache(cache_section(config).url, config)


def hits_by_camera(cache: TinyCache, *, num_views: int) -> dict[str, tuple[int, int]]:
    """Of each camera the rows, and those for which the largest stored logit is that of the label."""
    opened, rows, hits = open_cache(cache.url), Counter[str](), Counter[str]()
    for shard in opened.shards:
        index = opened.index(shard)
        for view in range(num_views):
            logits = opened.view(shard.shard_id, view).decoded("logits").tolist()
            for scores, label, camera in zip(logits, index.targets["label"], index.targets["domain"], strict=True):
                if camera is not None:
                    rows[camera] += 1
                    hits[camera] += scores.index(max(scores)) == label
    return {camera: (rows[camera], hits[camera]) for camera in CAMERAS}


def test_a_cache_has_the_teachers_accuracy_by_domain(cache: TinyCache) -> None:
    expected = hits_by_camera(cache, num_views=2)
    assert sum(rows for rows, _ in expected.values()) == 48
    report = inspect_cache(cache.url)
    assert {name: values["top-1"] for name, values in report.teacher_by_domain.items()} == {
        name: hits / rows for name, (rows, hits) in expected.items()
    }
    assert list(report.teacher_metrics) == ["top-1", "top-5"]
    assert [line for line in describe_cache(report).splitlines() if line.startswith("  domain")]
    assert verify_cache(cache.url).problems == []


@pytest.mark.parametrize(
    "key",
    [
        "domain:east/top1_hits",
        "domain:north/labelled",
        "domain:a%2Fb%3A%2050%20%25/class_counts/3",
        "domain:x/labelled",
    ],
)
def test_a_commit_with_other_statistics_of_a_domain_is_found(cache: TinyCache, key: str) -> None:
    commit = read_commits(cache.url)[0]
    sums = {**commit.statistics.sums, key: commit.statistics.sums.get(key, 0) + 40}
    statistics = commit.statistics.model_copy(update={"sums": sums})
    replace_commit(cache, commit.model_copy(update={"statistics": statistics}))
    republish(cache)
    assert {problem.file for problem in verify_cache(cache.url).problems} == {commit.part.path}


def test_mixed_rows_count_in_no_domain(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = cameras_config(tiny_config(), tmp_path)
    build(config)
    cache = TinyCache(cache_section(config).url, config)
    # The eval pass of the class means is not mixed.
    sums = open_cache(cache.url).manifest.statistics.sums
    rows = Counter(camera_of(row) for row in range(30))
    assert sums["domain:north/labelled"] == rows["north"]
    assert verify_cache(cache.url).problems == []


def test_labels_and_domains_are_read_again(cache: TinyCache, tmp_path: Path) -> None:
    samples = [
        (key, {**members, "json": json.dumps({"meta": {"camera": "north"}}).encode()})
        for key, members in digit_samples(30)
    ]
    pack_shards(samples, f"{tmp_path}/cameras-%d.tar", shard_size=20)
    relabel(cache.url)
    report = inspect_cache(cache.url)
    assert report.teacher_by_domain == {"north": report.teacher_metrics}
    assert verify_cache(cache.url).problems == []


def test_a_teacher_without_classes_has_no_metrics_of_domains() -> None:
    task = task_of(DataConfig.model_validate({"task": "embedding", "domain": "json:camera"}))
    sums = task.accumulate()
    targets = {"label": np.array([1, -1], np.int32), "domain": np.array(["north", None], object)}
    sums.add({"embedding": np.zeros((2, 4), np.float32)}, targets)
    statistics = Statistics.model_validate(sums.result())
    assert statistics.sums["domain:north/labelled"] == 1
    assert task.teacher_metrics_by_domain(statistics) == {}
