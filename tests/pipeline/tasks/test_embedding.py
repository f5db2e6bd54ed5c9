"""Teachers without a classifier: caches of their embedding, without logits, accuracies or required labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.cache.build.context import current_context, prepare
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import recompute, verify_cache
from pipeline.cache.verify.report import Findings
from pipeline.core.errors import ConfigError
from pipeline.shards.labels import LabelCount, check_label_member, label_warning
from pipeline.shards.shard_head import read_shard_head
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.cache.verify.forge import replace_commit, republish
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples, read_commits
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.models.loading import FACTORIES

TOWER: dict[str, Any] = {"model": f"{FACTORIES}:Tower", "kwargs": {}, "weights": "random"}


def embedding_config(
    base: Config, *, cache: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **sections: Any
) -> Config:
    """``base`` for the network ``Tower``, with the default encodings unless given."""
    tree = base.model_dump(mode="json", exclude_unset=True)
    tree["data"] = {"shards": tree["data"]["shards"], "task": "embedding", **(data or {})}
    tree["cache"] = {"url": tree["cache"]["url"], **(cache or {})}
    for section, keys in {"teacher": TOWER, **sections}.items():
        tree[section] = {**tree[section], **keys}
    return Config.model_validate(tree)


@pytest.fixture(params=[None, "fp32", "int8"])
def cache(tiny_config: TinyConfig, request: pytest.FixtureRequest) -> TinyCache:
    """Of two unmixed views of 35 images with labels."""
    encoding = {} if request.param is None else {"embeddings": request.param}
    config = embedding_config(tiny_config(), cache=encoding, views={"kind": "crop", "count": 2})
    build(config)
    return TinyCache(cache_section(config).url, config)


def test_a_cache_has_the_embedding_alone_and_is_verified_also_by_its_teacher(cache: TinyCache) -> None:
    opened = open_cache(cache.url)
    assert [(output.name, output.shape) for output in opened.header.outputs] == [("embedding", (6,))]
    assert (opened.header.num_classes, opened.header.teacher["logits"]) == (0, "none")
    assert opened.header.teacher["embeddings"] == cache_section(cache.config).embeddings
    labels = [int(members["cls"]) for _, members in digit_samples(35)]
    statistics = opened.manifest.statistics
    assert statistics.labelled == 2 * 35
    assert statistics.class_counts == {k: 2 * labels.count(k) for k in range(10)}
    assert (statistics.top1_hits, statistics.argmax_flips, statistics.sums) == (0, 0, {})
    report = inspect_cache(cache.url)
    assert (report.teacher_metrics, report.teacher_top1, report.kl_nats) == ({}, None, {})
    assert report.embedding_cosine is None or report.embedding_cosine == pytest.approx(1, abs=1e-3)
    assert verify_cache(cache.url).problems == []
    findings = Findings()
    recomputed = recompute(cache.url, current_context(cache.config), findings, num_rows=20, shard_urls={})
    assert (recomputed.rows, recomputed.identical, list(findings.problems)) == (20, 20, [])


def test_a_commit_with_another_count_of_labels_is_found(cache: TinyCache) -> None:
    commit = read_commits(cache.url)[0]
    statistics = commit.statistics.model_copy(update={"labelled": commit.statistics.labelled + 1})
    replace_commit(cache, commit.model_copy(update={"statistics": statistics}))
    republish(cache)
    assert {problem.file for problem in verify_cache(cache.url).problems} == {commit.part.path}


def test_no_labels_are_needed(tiny_config: TinyConfig, tmp_path: Path) -> None:
    samples = ((key, {"png": members["png"]}) for key, members in digit_samples(12))
    shards = pack_shards(samples, f"{tmp_path}/plain-%d.tar", shard_size=12)
    config = embedding_config(tiny_config(), data={"shards": shards})
    count = LabelCount.of_heads(
        [read_shard_head(shards[0], config.data, size_bytes=Path(shards[0]).stat().st_size)], config.data
    )
    check_label_member(count, config.data, where="shards")
    assert (count.num_labelled, label_warning(count, config.data)) == (0, None)
    with raises("data.label-not-found"):
        check_label_member(count, config.data, where="shards", option="--label ")
    build(config)
    opened = open_cache(cache_section(config).url)
    assert (opened.manifest.num_ok, opened.manifest.statistics.labelled) == (12, 0)
    assert verify_cache(opened.url).problems == []


@pytest.mark.parametrize(
    "sections",
    [
        {"cache": {"url": "x", "logits": "fp16"}},
        {"cache": {"url": "x", "embeddings": "none"}},
        {"data": {"task": "embedding", "heads": {"pair": {"num_classes": 10}}}},
    ],
)
def test_a_config_that_contradicts_the_task_is_refused(sections: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({"data": {"task": "embedding"}, **sections})


@pytest.mark.parametrize("class_means", ["view0", "eval", "means.json"])
def test_class_means_need_classes(tiny_config: TinyConfig, class_means: str) -> None:
    config = embedding_config(tiny_config(), cache={"class_means": class_means}, data={"num_classes": 10})
    with raises("config.class-means-without-classes", ConfigError, where="cache.class_means"):
        prepare(config)
