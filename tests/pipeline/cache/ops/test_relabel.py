"""Labels of a finished cache are read again without a teacher; pinned runs and verification still work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cache_ops import describe_relabelling
from pipeline import storage
from pipeline.cache.build.manifest import publish_manifest, read_manifest
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.ops.relabel import relabel
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import CacheError, ConfigError, ShardError
from pipeline.shards.writer import Members, pack_shards
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, copy_of, digit_samples, files, shard_urls
from tests.pipeline.conftest import build_tiny
from tests.pipeline.student.runs import CE, run_config

NUM, SHARD_SIZE = 20, 10
CLASSES = [int(members["cls"]) for _, members in digit_samples(NUM)]


def pack(folder: Path, label: str | None, *, shift: int = 0, swapped: bool = False) -> list[str]:
    """Packs two shards with the classes, plus ``shift``, in the member ``label``; None: only in a JSON member."""

    def samples() -> Iterator[tuple[str, Members]]:
        digits = list(digit_samples(NUM))
        images = [members["png"] for _, members in digits]
        if swapped:
            images[0], images[1] = images[1], images[0]
        for (key, members), image in zip(digits, images, strict=True):
            index = (int(members["cls"]) + shift) % 10
            text = {"json": json.dumps({"class": index}).encode()} if label is None else {label: str(index).encode()}
            yield key, {"png": image, **text}

    folder.mkdir(exist_ok=True)
    return pack_shards(samples(), f"{folder}/s-%02d.tar", shard_size=SHARD_SIZE)


def cache_over(shards: list[str], url: str, **sections: Any) -> TinyCache:
    keys = {"views": {"kind": "crop", "count": 1}, "cache": {"class_means": "none"}, **sections}
    return build_tiny(shards, url, keys)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyCache]:
    """Caches whose shards have the classes in a member ``cls``, which the config names, or in ``txt``."""
    folder = tmp_path_factory.mktemp("relabel")
    return {label: cache_over(pack(folder / label, label), f"{folder}/{label}/cache") for label in ("cls", "txt")}


@pytest.fixture
def labelled(built: dict[str, TinyCache], tmp_path: Path) -> TinyCache:
    """A copy that the test may change."""
    return copy_of(built["cls"], tmp_path / "cache")


@pytest.fixture
def unlabelled(built: dict[str, TinyCache], tmp_path: Path) -> TinyCache:
    """A copy that the test may change; its labels are in another member."""
    return copy_of(built["txt"], tmp_path / "cache")


def extended(config: Config) -> Config:
    return config.model_copy(update={"views": config.views.model_copy(update={"count": 2})})


def labels(cache: TeacherCache) -> list[int]:
    return np.concatenate([cache.index(shard).targets["label"] for shard in cache.shards]).tolist()


def test_shards_packed_again_with_labels_give_a_cache_its_labels(unlabelled: TinyCache, tmp_path: Path) -> None:
    url, config = unlabelled.url, unlabelled.config
    before = files(url)
    assert labels(open_cache(url)) == [-1] * NUM
    again = dict(zip(shard_urls(config), pack(tmp_path / "cls", "cls"), strict=True))
    relabelling = relabel(url, shard_urls=again, threads=2)
    assert str(relabelling.count) == f"{NUM} of {NUM}"
    cache = open_cache(url)
    assert labels(cache) == CLASSES
    # Hits of the stored logits of view 0.
    hits = sum(
        int((cache.view(shard.shard_id, 0).decoded("logits").argmax(1) == cache.index(shard).targets["label"]).sum())
        for shard in cache.shards
    )
    statistics = cache.manifest.statistics
    assert (statistics.labelled, statistics.top1_hits) == (NUM, hits)
    assert relabelling.teacher_metrics["top-1"] == hits / NUM
    report = inspect_cache(url)
    assert (report.teacher_top1, report.labels) == (hits / NUM, f"{NUM} of {NUM}")
    # No file that a commit or a pinned manifest names is changed.
    after = files(url)
    assert {path for path, data in before.items() if after[path] != data} == {
        "manifest.json",
        "manifest/shards.parquet",
    }
    # The cache names the shards that its labels were read from, because the others have other offsets.
    assert [cache.shard_url(shard) for shard in cache.shards] == [*again.values()]
    for given in (again, None):
        verified = verify_cache(url, shard_urls=given)
        assert (verified.problems, verified.num_unnamed) == ([], 0)
    moved: dict[str, Any] = {"data": {"cache": url, "shards": [*again.values()]}, "loss": CE, "train": {"epochs": 1}}
    assert train(run_config(config, tmp_path / "run", **moved))["steps"] == 3


@pytest.mark.parametrize("data", [{}, {"label": "txt"}], ids=["default", "named"])
def test_labels_may_be_in_another_member_of_the_same_shards(
    unlabelled: TinyCache, tmp_path: Path, data: dict[str, str]
) -> None:
    url = unlabelled.url
    relabel(url, label="txt")
    assert open_cache(url).data["label"] == "txt"
    assert not verify_cache(url).problems
    run = run_config(unlabelled.config, tmp_path / "run", loss=CE, data=data, train={"epochs": 1})
    assert train(run)["steps"] == 3


def test_a_pinned_manifest_has_its_former_labels(labelled: TinyCache, tmp_path: Path) -> None:
    url = labelled.url
    pinned = read_manifest(url)[1]
    # The manifest of a cache that was never relabelled has no such key.
    assert "labels" not in json.loads(pinned)
    shifted = dict(zip(shard_urls(labelled.config), pack(tmp_path / "b", "cls", shift=3), strict=True))
    relabel(url, shard_urls=shifted)
    assert labels(open_cache(url, manifest_bytes=pinned)) == CLASSES
    assert labels(open_cache(url)) == [(label + 3) % 10 for label in CLASSES]
    # A second call writes the same files.
    before = files(url)
    relabel(url, shard_urls=shifted)
    assert files(url) == before


def test_other_images_are_refused_and_nothing_is_published(labelled: TinyCache, tmp_path: Path) -> None:
    before = read_manifest(labelled.url)[1]
    swapped = dict(zip(shard_urls(labelled.config), pack(tmp_path / "b", "cls", swapped=True), strict=True))
    with raises("cache.relabel-other-images", ShardError) as caught:
        relabel(labelled.url, shard_urls=swapped)
    assert "row 0, key digit-0000" in str(caught.value.where)
    assert read_manifest(labelled.url)[1] == before


def test_shards_that_the_cache_does_not_have_are_refused(labelled: TinyCache, tmp_path: Path) -> None:
    before = files(labelled.url)
    got = "1 of 3 shards, such as zzz-00"
    with raises("cache.relabel-unknown-shards", ConfigError, where="--shards", got=got):
        relabel(labelled.url, shard_urls={**shard_urls(labelled.config), "zzz-00": f"{tmp_path}/zzz-00.tar"})
    assert files(labelled.url) == before


def test_moved_shards_may_be_some_of_all_and_are_counted(labelled: TinyCache, tmp_path: Path) -> None:
    url, urls = labelled.url, shard_urls(labelled.config)
    first, second = urls
    elsewhere = pack(tmp_path / "b", "cls", shift=3)[0]
    relabelling = relabel(url, shard_urls={first: elsewhere})
    assert (relabelling.num_given, relabelling.count.num_shards) == (1, 2)
    cache = open_cache(url)
    assert [cache.shard_url(shard) for shard in cache.shards] == [elsewhere, urls[second]]
    assert "shards: 1 read as --shards names them, 1 where the build read them" in describe_relabelling(relabelling)
    assert not verify_cache(url).problems


def test_a_missing_label_option_and_a_wrong_member_are_refused(tmp_path: Path) -> None:
    url = cache_over(pack(tmp_path / "a", None), f"{tmp_path}/cache", data={"label": None}).url
    with raises("cache.relabel-without-label", ConfigError):
        relabel(url)
    got = f"labels: 0 of {NUM}; members seen: {NUM} json, {NUM} png"
    with raises("data.label-not-found", ShardError, got=got, next_step="append --label json:class"):
        relabel(url, label="cls")


def test_a_cache_that_was_changed_meanwhile_is_not_relabelled(labelled: TinyCache) -> None:
    def extend(done: int, _: int) -> None:
        if done == 1:
            build(extended(labelled.config))

    with raises("cache.changed-meanwhile", CacheError):
        relabel(labelled.url, progress=extend)
    assert open_cache(labelled.url).num_views == 2


def test_new_labels_stay_until_a_build_adds_something(unlabelled: TinyCache) -> None:
    url = unlabelled.url
    relabel(url, label="txt")
    stored = read_manifest(url)[1]
    publish_manifest(url, shard_urls(unlabelled.config))
    assert read_manifest(url)[1] == stored
    build(extended(unlabelled.config))
    assert labels(open_cache(url)) == [-1] * NUM
    relabel(url, label="txt")
    assert labels(open_cache(url)) == CLASSES
    assert not verify_cache(url).problems


def test_class_means_of_the_former_labels_are_left_out(tmp_path: Path) -> None:
    url = cache_over(pack(tmp_path / "a", "cls"), f"{tmp_path}/cache", cache={"class_means": "eval"}).url
    assert relabel(url).lost_means
    assert open_cache(url).class_means() is None
    assert not verify_cache(url).problems


def test_a_damaged_index_with_new_labels_is_found(labelled: TinyCache) -> None:
    url = labelled.url
    relabel(url)
    path = next(path for path in files(url) if path.startswith("labels/"))
    Path(url, path).write_bytes(storage.read(storage.join(url, path))[:-9])
    assert {problem.file for problem in verify_cache(url).problems} == {path}
