"""The build as Ray tasks: the same bytes as a plain loop, whatever was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.build_cache import build_cache
from pipeline.errors import CacheError, ShardError
from tests.jobs.conftest import Tree, config_of, files_below

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_cluster")
def test_a_build_by_ray_tasks_has_the_bytes_of_a_plain_loop(tree: Tree, tmp_path: Path) -> None:
    build_cache(config_of(tree(cache={"url": str(tmp_path / "loop")})))
    manifest = build_cache(config_of(tree(cache={"url": str(tmp_path / "ray")}, ray={"address": "local"})))
    assert files_below(tmp_path / "ray") == files_below(tmp_path / "loop")
    assert (manifest.num_ok, manifest.num_views, manifest.num_shards) == (96, 3, 4)


@pytest.mark.usefixtures("ray_cluster")
def test_a_resumed_build_makes_only_what_has_no_commit(tree: Tree, tmp_path: Path) -> None:
    config = config_of(tree(ray={"address": "local"}))
    build_cache(config)
    whole = files_below(tmp_path / "cache")
    lost = ["manifest.json", "commits/digits-02/v0000-0001.json"]
    for name in lost:
        (tmp_path / "cache" / name).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "parts").rglob("*.parquet")}
    build_cache(config)
    assert files_below(tmp_path / "cache") == whole
    again = [path.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert again == ["digits-02"]


def test_a_finished_build_run_again_changes_nothing(tree: Tree, tmp_path: Path) -> None:
    config = config_of(tree())
    build_cache(config)
    whole = files_below(tmp_path / "cache")
    build_cache(config)
    assert files_below(tmp_path / "cache") == whole


def test_more_views_extend_a_cache_and_leave_the_old_parts(tree: Tree, tmp_path: Path) -> None:
    build_cache(config_of(tree()))
    old = {
        name: data for name, data in files_below(tmp_path / "cache").items() if name.startswith(("parts", "commits"))
    }
    manifest = build_cache(config_of(tree(views={"count": 5})))
    new = files_below(tmp_path / "cache")
    assert manifest.num_views == 5
    assert {name: new[name] for name in old} == old


@pytest.mark.usefixtures("ray_cluster")
def test_a_damaged_shard_stops_the_build_by_name_and_leaves_no_manifest(
    tree: Tree, shards: list[str], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(shards[0]).read_bytes()[:5000])
    with pytest.raises(ShardError, match=r"cut\.tar"):
        build_cache(config_of(tree(data={"shards": [*shards[1:], str(cut)]}, ray={"address": "local"})))
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert not list((tmp_path / "cache").glob("*/cut*"))


def test_another_teacher_is_refused_before_any_work(tree: Tree, tmp_path: Path) -> None:
    build_cache(config_of(tree()))
    whole = files_below(tmp_path / "cache")
    other = tree()["teacher"] | {"kwargs": {"depth": 8, "widths": [4, 4, 6, 10]}}
    with pytest.raises(CacheError, match=r"teacher\.architecture\.kwargs"):
        build_cache(config_of(tree(teacher=other)))
    assert files_below(tmp_path / "cache") == whole
