"""A build with Ray tasks: the same bytes as a plain loop, also after interruptions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.build_cache import build_cache
from jobs.index_shards import index_shards
from pipeline.cache.build.part import BusyTime, PartTask, build_part
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.core.errors import CacheError, ShardError, StorageInputError
from pipeline.shards.omissions import Omissions
from pipeline.shards.writer import pack_shards
from schemas.cache_format import Commit
from tests.errors import raises
from tests.jobs.conftest import Tree, config_of, files_below
from tests.pipeline.caches import digit_samples
from tests.pipeline.shards.tars import make_tar

pytestmark = pytest.mark.ray


def written_at(cache: Path) -> dict[Path, int]:
    """The time of the last write of each part."""
    return {path: path.stat().st_mtime_ns for path in (cache / "parts").rglob("*.parquet")}


@pytest.mark.usefixtures("ray_cluster")
def test_a_build_by_ray_tasks_has_the_bytes_of_a_plain_loop(tree: Tree, cache_of_session: Path, tmp_path: Path) -> None:
    manifest = build_cache(config_of(tree(ray={"address": "local"})))
    assert files_below(tmp_path / "cache") == files_below(cache_of_session)
    assert (manifest.num_ok, manifest.num_views, manifest.num_shards) == (96, 3, 4)


@pytest.mark.usefixtures("ray_cluster")
def test_a_resumed_build_builds_only_parts_without_a_commit(tree: Tree, built_cache: Path) -> None:
    finished, before = files_below(built_cache), written_at(built_cache)
    for name in ("manifest.json", "commits/digits-02/v0000-0001.json"):
        (built_cache / name).unlink()
    build_cache(config_of(tree(ray={"address": "local"})))
    assert files_below(built_cache) == finished
    assert [path.parent.name for path, _ in written_at(built_cache).items() - before.items()] == ["digits-02"]


def test_a_finished_build_run_again_changes_nothing(tree: Tree, built_cache: Path) -> None:
    finished = files_below(built_cache)
    build_cache(config_of(tree()))
    assert files_below(built_cache) == finished


def test_more_views_extend_a_cache_and_do_not_change_its_parts(tree: Tree, built_cache: Path) -> None:
    before = {name: data for name, data in files_below(built_cache).items() if name.startswith(("parts", "commits"))}
    manifest = build_cache(config_of(tree(views={"count": 5})))
    after = files_below(built_cache)
    assert manifest.num_views == 5
    assert {name: after[name] for name in before} == before


def test_members_left_out_of_shards_are_reported_once_with_counts_and_reasons(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members: list[tuple[str, bytes | str]] = [("d/.DS_Store", b"x"), ("d/gone.png", "d/nothing.png")]
    for key, sample in digit_samples(12):
        members += [(f"d/._{key}.png", b"x"), *((f"d/{key}.{name}", content) for name, content in sample.items())]
    members += [("d/bad.png", b"<html>"), ("d/bad.cls", b"1")]
    (tmp_path / "odd.tar").write_bytes(make_tar(members))
    data = {"shards": [str(tmp_path / "odd.tar")], "bad_samples": "skip", "max_bad_share": 0.5}
    config = config_of(tree(data=data, cache={"views_per_part": 1}))
    build_cache(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 3
    assert lines[0].startswith("cache: left out 13 hidden members (d/.DS_Store, d/._digit-0000.png, ")
    assert lines[1:] == [
        "cache: left out 1 links whose target is not in the tar (d/gone.png)",
        "cache: left out 1 undecodable samples (odd/d/bad: not a JPEG, PNG or WebP image, but HTML)",
    ]
    # Indexing reports the same, and a second call reports nothing.
    for expected in ([line.replace("cache:", "index:") for line in lines], []):
        index_shards(config, str(tmp_path / "index"))
        assert [line for line in capsys.readouterr().err.splitlines() if "left out" in line] == expected


def test_another_teacher_is_refused_before_any_work(tree: Tree, built_cache: Path) -> None:
    finished = files_below(built_cache)
    changed = tree()["teacher"] | {"kwargs": {"depth": 8, "widths": [4, 4, 6, 10]}}
    with raises("cache.other-header", CacheError) as caught:
        build_cache(config_of(tree(teacher=changed)))
    assert "teacher.architecture.kwargs" in str(caught.value.got)
    assert files_below(built_cache) == finished


@pytest.mark.parametrize("lost", ["parts/digits-02/v0000-0001.*", "means/digits-01/*", "index/digits-03.parquet"])
def test_a_deleted_file_is_built_again_although_a_commit_names_it(
    tree: Tree, built_cache: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, before = files_below(built_cache), written_at(built_cache)
    next(built_cache.glob(lost)).unlink()
    build_cache(config_of(tree()))
    assert files_below(built_cache) == finished
    is_index = lost.startswith("index")
    assert ("cache: 1 dangling commits" in capsys.readouterr().err) is not is_index
    # An index is restored without the teacher: every part stays.
    assert len(written_at(built_cache).items() - before.items()) == (0 if is_index else 1)


def copied_shards(shards: list[str], folder: Path) -> list[str]:
    folder.mkdir()
    return [str(shutil.copy(url, folder)) for url in shards]


def test_an_index_is_not_restored_from_a_shard_that_changed(tree: Tree, shards: list[str], tmp_path: Path) -> None:
    copies = copied_shards(shards, tmp_path / "copies")
    config = config_of(tree(data={"shards": copies}))
    build_cache(config)
    index = tmp_path / "cache" / "index" / "digits-00.parquet"
    index.unlink()
    renamed = [(key.replace("0003", "9003"), members) for key, members in digit_samples(24)]
    pack_shards(renamed, f"{tmp_path}/copies/digits-%02d.tar", shard_size=24)
    with raises("cache.index-not-reproducible", CacheError) as caught:
        build_cache(config)
    assert "commits/digits-00" in str(caught.value.next_step)
    assert not index.exists()
    shutil.rmtree(tmp_path / "cache" / "commits" / "digits-00")
    assert build_cache(config).num_ok == 96


def test_fewer_shards_than_the_finished_cache_are_refused_before_any_change(
    tree: Tree, shards: list[str], built_cache: Path
) -> None:
    finished = files_below(built_cache)
    with raises("cache.lost-shards", CacheError, got="digits-00, digits-03"):
        build_cache(config_of(tree(data={"shards": shards[1:3]}, views={"count": 5})))
    assert files_below(built_cache) == finished


def test_a_damaged_table_of_shards_is_repaired_and_still_prevents_the_loss_of_shards(
    tree: Tree, shards: list[str], built_cache: Path
) -> None:
    finished = files_below(built_cache)
    (built_cache / "manifest" / "shards.parquet").write_bytes(b"damaged")
    with raises("cache.lost-shards", CacheError, got="digits-00"):
        build_cache(config_of(tree(data={"shards": shards[1:]})))
    build_cache(config_of(tree()))
    repaired = files_below(built_cache)
    assert {name: repaired[name] for name in finished} == finished


def test_a_committed_shard_that_is_changed_or_missing_is_named(tree: Tree, shards: list[str], tmp_path: Path) -> None:
    copies = copied_shards(shards, tmp_path / "copies")
    config, changed = config_of(tree(data={"shards": copies})), Path(copies[1])
    build_cache(config)
    finished = files_below(tmp_path / "cache")
    changed.write_bytes(changed.read_bytes() + bytes(10240))
    with raises("shard.changed-since-build", ShardError, where=str(changed)):
        build_cache(config)
    changed.unlink()
    with raises("data.shards-moved", StorageInputError, where=str(changed)):
        build_cache(config)
    assert files_below(tmp_path / "cache") == finished


def test_inspect_shows_the_progress_of_a_stopped_build_and_a_finished_one_leaves_no_log(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_built = 0

    def stops_after_five(task: PartTask, busy: BusyTime, omissions: Omissions) -> Commit:
        nonlocal num_built
        if num_built == 5:
            raise KeyboardInterrupt
        num_built += 1
        return build_part(task, busy, omissions)

    config = config_of(tree())
    with monkeypatch.context() as patch:
        patch.setattr("jobs.build_cache.build_part", stops_after_five)
        with pytest.raises(KeyboardInterrupt):
            build_cache(config)
    report = inspect_cache(str(tmp_path / "cache"))
    assert (report.num_parts, report.num_parts_planned, report.finished) == (5, 12, False)
    build_cache(config)
    assert not list((tmp_path / "cache").glob("log/*"))
