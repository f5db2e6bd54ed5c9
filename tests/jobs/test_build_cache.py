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


@pytest.mark.usefixtures("ray_cluster")
def test_a_build_by_ray_tasks_has_the_bytes_of_a_plain_loop(tree: Tree, tmp_path: Path) -> None:
    build_cache(config_of(tree(cache={"url": str(tmp_path / "loop")})))
    manifest = build_cache(config_of(tree(cache={"url": str(tmp_path / "ray")}, ray={"address": "local"})))
    assert files_below(tmp_path / "ray") == files_below(tmp_path / "loop")
    assert (manifest.num_ok, manifest.num_views, manifest.num_shards) == (96, 3, 4)


@pytest.mark.usefixtures("ray_cluster")
def test_a_resumed_build_builds_only_parts_without_a_commit(tree: Tree, tmp_path: Path) -> None:
    config = config_of(tree(ray={"address": "local"}))
    build_cache(config)
    finished = files_below(tmp_path / "cache")
    lost = ["manifest.json", "commits/digits-02/v0000-0001.json"]
    for name in lost:
        (tmp_path / "cache" / name).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "parts").rglob("*.parquet")}
    build_cache(config)
    assert files_below(tmp_path / "cache") == finished
    rebuilt = [path.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert rebuilt == ["digits-02"]


def test_a_finished_build_run_again_changes_nothing(tree: Tree, tmp_path: Path) -> None:
    config = config_of(tree())
    build_cache(config)
    finished = files_below(tmp_path / "cache")
    build_cache(config)
    assert files_below(tmp_path / "cache") == finished


def test_more_views_extend_a_cache_and_do_not_change_its_parts(tree: Tree, tmp_path: Path) -> None:
    build_cache(config_of(tree()))
    old = {
        name: data for name, data in files_below(tmp_path / "cache").items() if name.startswith(("parts", "commits"))
    }
    manifest = build_cache(config_of(tree(views={"count": 5})))
    new = files_below(tmp_path / "cache")
    assert manifest.num_views == 5
    assert {name: new[name] for name in old} == old


@pytest.mark.usefixtures("ray_cluster")
def test_a_damaged_shard_is_named_and_no_manifest_is_published(tree: Tree, shards: list[str], tmp_path: Path) -> None:
    truncated = tmp_path / "cut.tar"
    truncated.write_bytes(Path(shards[0]).read_bytes()[:5000])
    with pytest.raises(ShardError) as caught:
        build_cache(config_of(tree(data={"shards": [*shards[1:], str(truncated)]}, ray={"address": "local"})))
    assert "cut.tar" in str(caught.value)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert not list((tmp_path / "cache").glob("*/cut*"))


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


def test_another_teacher_is_refused_before_any_work(tree: Tree, tmp_path: Path) -> None:
    build_cache(config_of(tree()))
    finished = files_below(tmp_path / "cache")
    changed = tree()["teacher"] | {"kwargs": {"depth": 8, "widths": [4, 4, 6, 10]}}
    with raises("cache.other-header", CacheError) as caught:
        build_cache(config_of(tree(teacher=changed)))
    assert "teacher.architecture.kwargs" in str(caught.value.got)
    assert files_below(tmp_path / "cache") == finished


@pytest.mark.parametrize("lost", ["parts/digits-02/v0000-0001.*", "means/digits-01/*", "index/digits-03.parquet"])
def test_a_deleted_file_is_built_again_although_a_commit_names_it(
    tree: Tree, tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tree())
    build_cache(config)
    finished = files_below(tmp_path / "cache")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "parts").rglob("*.parquet")}
    next((tmp_path / "cache").glob(lost)).unlink()
    capsys.readouterr()
    build_cache(config)
    assert files_below(tmp_path / "cache") == finished
    is_index = lost.startswith("index")
    assert ("cache: 1 dangling commits" in capsys.readouterr().err) is not is_index
    # An index is restored without the teacher: every part stays.
    assert sum(path.stat().st_mtime_ns != stamp for path, stamp in stamps.items()) == (0 if is_index else 1)


def copied_shards(shards: list[str], folder: Path) -> list[str]:
    folder.mkdir()
    return [str(shutil.copy(url, folder)) for url in shards]


def test_an_index_is_not_restored_from_a_shard_that_changed(tree: Tree, shards: list[str], tmp_path: Path) -> None:
    copies = copied_shards(shards, tmp_path / "own")
    config = config_of(tree(data={"shards": copies}))
    build_cache(config)
    index = tmp_path / "cache" / "index" / "digits-00.parquet"
    index.unlink()
    renamed = [(key.replace("0003", "9003"), members) for key, members in digit_samples(24)]
    pack_shards(renamed, f"{tmp_path}/own/digits-%02d.tar", shard_size=24)
    with raises("cache.index-not-reproducible", CacheError) as caught:
        build_cache(config)
    assert "commits/digits-00" in str(caught.value.next_step)
    assert not index.exists()
    shutil.rmtree(tmp_path / "cache" / "commits" / "digits-00")
    assert build_cache(config).num_ok == 96


def test_fewer_shards_than_the_finished_cache_are_refused_before_any_change(
    tree: Tree, shards: list[str], tmp_path: Path
) -> None:
    build_cache(config_of(tree()))
    finished = files_below(tmp_path / "cache")
    fewer = config_of(tree(data={"shards": shards[1:3]}, views={"count": 5}))
    with raises("cache.lost-shards", CacheError, got="digits-00, digits-03"):
        build_cache(fewer)
    assert files_below(tmp_path / "cache") == finished


def test_a_damaged_table_of_shards_is_repaired_and_still_prevents_the_loss_of_shards(
    tree: Tree, shards: list[str], tmp_path: Path
) -> None:
    build_cache(config_of(tree()))
    finished = files_below(tmp_path / "cache")
    (tmp_path / "cache" / "manifest" / "shards.parquet").write_bytes(b"damaged")
    with raises("cache.lost-shards", CacheError, got="digits-00"):
        build_cache(config_of(tree(data={"shards": shards[1:]})))
    build_cache(config_of(tree()))
    repaired = files_below(tmp_path / "cache")
    assert {name: repaired[name] for name in finished} == finished


@pytest.mark.parametrize("change", ["removed", "grown"])
def test_a_committed_shard_that_is_missing_or_changed_is_named(
    tree: Tree, shards: list[str], tmp_path: Path, change: str
) -> None:
    copies = copied_shards(shards, tmp_path / "own")
    config = config_of(tree(data={"shards": copies}))
    build_cache(config)
    finished = files_below(tmp_path / "cache")
    if change == "removed":
        Path(copies[1]).unlink()
    else:
        Path(copies[1]).write_bytes(Path(copies[1]).read_bytes() + bytes(10240))
    kind = StorageInputError if change == "removed" else ShardError
    with pytest.raises(kind) as caught:
        build_cache(config)
    assert caught.value.code == {"removed": "data.shards-moved", "grown": "shard.changed-since-build"}[change]
    assert str(caught.value.where).endswith("digits-01.tar")
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
