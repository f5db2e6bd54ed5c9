"""What a build does once for each shard must not grow with the number of shards."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.build_cache import build_cache, check_shards, plan_tasks
from pipeline import storage
from pipeline.cache.build.class_means import ClassSums
from pipeline.cache.build.context import load_context
from pipeline.cache.build.manifest import read_sums
from pipeline.core.errors import StorageInputError
from schemas.cache_format import FileRef
from tests.errors import raises
from tests.jobs.conftest import Tree, config_of, files_below

pytestmark = pytest.mark.ray


def test_a_task_does_not_contain_the_urls_of_other_shards(tree: Tree) -> None:
    sizes = set[int]()
    for count in (10, 5_000):
        urls = [f"s3://bucket/train/shard-{number:05d}.tar" for number in range(count)]
        config = config_of(tree(data={"shards": urls, "val_shards": urls}))
        tasks = plan_tasks(config, {f"shard-{number:05d}": url for number, url in enumerate(urls)}, [])
        assert len(tasks) == 3 * count
        sizes.add(len(pickle.dumps(tasks[0])))
    assert len(sizes) == 1


def test_a_build_loads_its_teacher_once_whatever_names_its_shards(tree: Tree) -> None:
    load_context.cache_clear()
    build_cache(config_of(tree()))
    assert load_context.cache_info().misses == 1


@pytest.mark.slow
def test_class_sums_added_up_in_tasks_give_the_same_means(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cache(config_of(tree(cache={"url": str(tmp_path / "one")})))
    chunk_sizes = list[int]()

    def counted(cache_url: str, refs: Sequence[FileRef]) -> ClassSums:
        chunk_sizes.append(len(refs))
        return read_sums(cache_url, refs)

    monkeypatch.setattr("jobs.build_cache.SUMS_PER_TASK", 3)
    monkeypatch.setattr("jobs.build_cache.read_sums", counted)
    build_cache(config_of(tree(cache={"url": str(tmp_path / "many")})))
    assert files_below(tmp_path / "many") == files_below(tmp_path / "one")
    assert chunk_sizes == [3, 1]


def test_a_folder_of_many_shards_is_listed_once_and_a_missing_shard_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()
    for name in ("size", "sizes_in_folder"):
        call = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda url, call=call, name=name: (calls.update([name]), call(url))[1])
    monkeypatch.setattr("pipeline.storage.objects.NAMES_PER_PAGE", 20)
    folder = f"memory://{tmp_path.name}"
    by_id = {
        f"{place}-{number:02d}": f"{folder}/{place}/{place}-{number:02d}.tar"
        for place, count in (("many", 20), ("few", 3))
        for number in range(count)
    }
    for number, url in enumerate(by_id.values()):
        storage.write(url, bytes(number))
    sizes = check_shards(f"{folder}/cache", by_id, [])
    assert sizes == {shard: number for number, shard in enumerate(by_id)}
    assert calls == {"sizes_in_folder": 1, "size": 3}
    storage.delete(by_id["many-07"])
    with raises("data.shards-moved", StorageInputError) as caught:
        check_shards(f"{folder}/cache", by_id, [])
    assert (caught.value.where, caught.value.got) == (
        by_id["many-07"],
        "1 of 23 shards are not where they are expected",
    )


def test_a_shard_whose_name_leaves_no_room_for_suffixes_is_refused_before_work(tmp_path: Path) -> None:
    shard = "n" * 249
    (tmp_path / f"{shard}.tar").touch()
    with raises("storage.name-too-long", StorageInputError):
        check_shards(f"{tmp_path}/cache", {shard: f"{tmp_path}/{shard}.tar"}, [])
    assert not (tmp_path / "cache").exists()
