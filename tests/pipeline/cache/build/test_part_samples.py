"""Samples of a shard that a part cannot use, shards that changed, and outputs that are not finite."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import storage
from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import PartTask, build_part
from pipeline.cache.build.shard_index import IndexTask, restore_index
from pipeline.cache.format import layout
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import CacheError, ShardError
from pipeline.shards.index import encode_index, index_settings, index_shard
from pipeline.shards.omissions import Omissions
from pipeline.shards.publish import publish_index, publish_shard_index
from pipeline.shards.writer import Members, pack_shards
from schemas.cache_format import ViewBlock
from schemas.config import Config
from tests.pipeline.caches import build, cache_section, digit_samples, files, open_tasks, read_commits
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.shards.tars import make_tar

SKIP = {"bad_samples": "skip", "max_bad_share": 1.0}


def first_view(config: Config) -> PartTask:
    assert isinstance(config.data.shards, tuple)
    return PartTask(config, config.data.shards[0], ViewBlock(start=0, stop=1))


def with_samples(
    folder: Path, tiny_config: TinyConfig, change: Callable[[int, dict[str, bytes]], Members], **overrides: Any
) -> Config:
    """A config over one shard of 20 digits, each changed by ``change(row, members)``."""
    samples = [(key, change(row, dict(members))) for row, (key, members) in enumerate(digit_samples(20))]
    shards = pack_shards(samples, f"{folder}/shard-%02d.tar", shard_size=20)
    data = {"shards": shards, **overrides.pop("data", {})}
    return tiny_config(data=data, **overrides)


@pytest.mark.parametrize("count", [20, 5], ids=["as long", "shorter"])
def test_indexing_a_shard_that_was_replaced_under_its_name_is_refused(
    tiny_config: TinyConfig, tmp_path: Path, count: int
) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: members)
    assert isinstance(config.data.shards, tuple)
    url, folder = config.data.shards[0], str(tmp_path / "indexes")
    for _ in range(2):
        assert publish_shard_index(url, data=config.data, folder_url=folder, threads=1).num_ok == 20
    digits = [members for _, members in digit_samples(21)][21 - count :]
    pack_shards(
        [(f"digit-{row:04d}", members) for row, members in enumerate(digits)],
        f"{tmp_path}/again/shard-%02d.tar",
        shard_size=count,
    )
    Path(url).write_bytes((tmp_path / "again/shard-00.tar").read_bytes())
    with pytest.raises(ShardError, match=r"shard\.changed\][\s\S]*digit-0019"):
        publish_shard_index(url, data=config.data, folder_url=folder, threads=1)


def odd_tar(folder: Path) -> str:
    """Ten digits in a folder, five hard links to the first of them and a hidden file between; returns the URL."""
    members: list[tuple[str, bytes | str]] = [("d/.DS_Store", b"x")]
    for key, sample in digit_samples(10):
        members += [(f"d/{key}.{extension}", content) for extension, content in sample.items()]
    first = next(iter(digit_samples(1)))[0]
    for row in range(5):
        members += [(f"d/link-{row}.{extension}", f"d/{first}.{extension}") for extension in ("png", "cls")]
    (folder / "odd.tar").write_bytes(make_tar(members))
    return str(folder / "odd.tar")


def test_linked_images_are_in_the_cache_and_hidden_members_are_counted(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(data={"shards": (odd_tar(tmp_path),)})
    prepare(config)
    first, *others = open_tasks(config)
    omissions = [Omissions() for _ in range(2)]
    commit = build_part(first, omissions=omissions[0])
    assert (commit.num_ok, commit.read, commit.skipped) == (15, 15, {})
    assert omissions[0].lines() == ["1 hidden members (d/.DS_Store)"]
    # Later parts are built from the index, and count nothing again.
    assert build_part(others[0], omissions=omissions[1]).num_ok == 15
    assert omissions[1].lines() == []


def test_a_build_continues_with_an_index_of_the_first_version(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(data={"shards": (odd_tar(tmp_path),), **SKIP})
    url, (first, *others) = cache_section(config).url, open_tasks(config)
    old = index_shard(Path(first.shard_url), config.data, where=first.shard_url, rules=1)
    data = encode_index(old, index_settings(config.data))
    publish_index(storage.join(url, layout.INDEX), "odd", data)
    prepare(config)
    omissions = Omissions()
    commit = build_part(first, omissions=omissions)
    assert (commit.num_ok, commit.skipped) == (10, {"no_image": 1})
    (line,) = omissions.lines()
    assert line.startswith("10 links ignored")
    # The lost index is restored with the same bytes, so that the other parts fit it.
    storage.delete(storage.join(url, layout.index_path("odd")))
    restore_index(IndexTask(config, first.shard_url, commit.index.sha256))
    assert storage.read(storage.join(url, layout.index_path("odd"))) == data
    for task in others:
        assert build_part(task).num_ok == 10


def bad(row: int, members: dict[str, bytes]) -> Members:
    """Rows 3, 4 and 12 cannot be decoded, are empty, or have no image."""
    changes = {3: {"png": b"not a png"}, 4: {"png": b""}, 12: {"png": None}}
    return {name: data for name, data in {**members, **changes.get(row, {})}.items() if data is not None}


def test_groups_are_full_whatever_bad_samples_lie_between_and_their_reasons_are_reported(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    # Without an eval pass before it, the first block of views meets the bad samples itself.
    config = with_samples(tmp_path, tiny_config, bad, data=SKIP, cache={"class_means": "none"})
    prepare(config)
    omissions = Omissions()
    first = build_part(open_tasks(config)[0], omissions=omissions)
    assert sum(omissions.counts.values()) == sum(first.skipped.values()) == 3
    assert any("undecodable samples (shard-00/" in line and ": " in line for line in omissions.lines())
    manifest = build(config)
    assert (manifest.num_samples, manifest.num_ok) == (20, 17)
    assert manifest.skipped == {"empty": 1, "no_image": 1, "undecodable": 1}
    for commit in read_commits(cache_section(config).url):
        assert commit.read == 20 == commit.written + sum(commit.skipped.values())
    columns = open_cache(cache_section(config).url).view("shard-00", 1)
    ok = [row for row in range(20) if row not in (3, 4, 12)]
    assert columns.row_N.tolist() == ok
    # 17 ok rows: two groups of 8 and a last row alone.
    groups = [set(ok[:8]), set(ok[8:16]), {ok[16]}]
    for row, partner in zip(ok, columns.mix_row_N.tolist(), strict=True):
        assert any({row, partner} <= group for group in groups)
        assert (row == partner) == (row == ok[16])


def test_a_bad_sample_under_fail_leaves_no_commit(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, bad)
    with pytest.raises(ShardError, match=r"shard\.bad-samples[\s\S]*digit-0003 \(undecodable: "):
        build(config)
    assert list(files(cache_section(config).url)) == ["header.json"]


def test_a_known_index_with_bad_samples_is_refused_under_fail(tiny_config: TinyConfig, tmp_path: Path) -> None:
    build(with_samples(tmp_path, tiny_config, bad, data=SKIP, views={"count": 1}))
    with pytest.raises(ShardError, match=r"shard\.bad-samples"):
        build(with_samples(tmp_path, tiny_config, bad))


def test_more_bad_samples_than_may_be_skipped_leave_no_commit_and_no_index(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    data = {"bad_samples": "skip"}
    config = with_samples(tmp_path, tiny_config, bad, data=data)
    with pytest.raises(ShardError, match=r"shard\.bad-samples[\s\S]*digit-0003[\s\S]*at most 0\.1 "):
        build(config)
    assert list(files(cache_section(config).url)) == ["header.json"]
    assert build(with_samples(tmp_path, tiny_config, bad, data={**data, "max_bad_share": 0.15})).num_ok == 17


def test_a_truncated_shard_keeps_its_complete_samples_and_counts_the_truncated_one(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: members, data={"bad_samples": "skip"})
    assert isinstance(config.data.shards, tuple)
    path = Path(config.data.shards[0])
    with tarfile.open(path) as archive:
        offset = archive.getmember("digit-0015.png").offset_data
    path.write_bytes(path.read_bytes()[: offset + 10])
    manifest = build(config)
    assert (manifest.num_samples, manifest.num_ok, manifest.skipped) == (16, 15, {"truncated": 1})
    assert open_cache(cache_section(config).url).view("shard-00", 2).row_N.tolist() == list(range(15))
    with pytest.raises(ShardError, match=r"shard\.bad-samples"):
        build(tiny_config(data={"shards": [str(path)]}, views={"count": 4}))


def test_a_shard_without_one_good_sample_is_a_cache_of_no_rows(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: {**members, "png": b"no"}, data=SKIP)
    manifest = build(config)
    cache = open_cache(cache_section(config).url)
    assert (manifest.num_ok, manifest.skipped) == (0, {"undecodable": 20})
    assert cache.view("shard-00", 2).decoded("logits").shape == (0, 10)


def plain(row: int, members: dict[str, bytes]) -> Members:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (9, 9, 9)).save(buffer, "PNG")
    return {**members, "png": buffer.getvalue()} if row in (5, 11) else members


def test_nan_from_a_teacher_names_the_samples(tiny_config: TinyConfig, tmp_path: Path) -> None:
    teacher = {"model": "python:tests.pipeline.cache.teachers:NanOnPlainImages", "kwargs": {}}
    config = with_samples(tmp_path, tiny_config, plain, teacher=teacher, views={"kind": "crop"})
    with pytest.raises(ShardError, match=r"model\.not-finite[\s\S]*keys digit-0005\n"):
        build(config)
    assert read_commits(cache_section(config).url) == []


def grey_or_white(row: int, members: dict[str, bytes]) -> Members:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (255, 255, 255) if row in (5, 11) else (110, 110, 110)).save(buffer, "PNG")
    return {**members, "png": buffer.getvalue()}


def test_infinity_in_half_precision_names_the_samples(tiny_config: TinyConfig, tmp_path: Path) -> None:
    hot = {"model": "python:tests.pipeline.cache.teachers:HotOnWhite", "kwargs": {}}
    views = {"kind": "crop", "count": 1}
    config = with_samples(tmp_path, tiny_config, grey_or_white, teacher={**hot, "precision": "fp16"}, views=views)
    with pytest.raises(ShardError, match=r"model\.not-finite[\s\S]*keys digit-0005\n"):
        build(config)
    assert read_commits(cache_section(config).url) == []
    build(with_samples(tmp_path, tiny_config, grey_or_white, teacher=hot, views=views, cache={"url": f"{tmp_path}/32"}))


def unlabelled(row: int, members: dict[str, bytes]) -> Members:
    return {name: data for name, data in members.items() if name != "cls" or row not in (2, 9)}


def test_class_means_refuse_a_sample_without_a_label(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, unlabelled)
    with pytest.raises(ShardError, match=r"shard\.unlabelled-samples[\s\S]*digit-0002[\s\S]*missing_labels=ignore"):
        build(config)


def test_missing_labels_are_left_out_of_the_means_when_configured(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, unlabelled, data={"missing_labels": "ignore"})
    build(config)
    cache = open_cache(cache_section(config).url)
    means = cache.class_means()
    assert means is not None
    assert means.count_K.sum() == 18
    assert cache.view("shard-00", 0).row_N.tolist() == list(range(20))


def test_a_shard_changed_since_it_was_indexed_is_found_by_a_later_block(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: members)
    prepare(config)
    build_part(first_view(config))
    assert isinstance(config.data.shards, tuple)
    path = Path(config.data.shards[0])
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard\.changed-since-index[\s\S]*digit-0000"):
        build(config)


def test_a_shard_that_grew_between_two_blocks_is_found(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: members)
    prepare(config)
    build_part(first_view(config))
    with_samples(tmp_path, tiny_config, lambda row, members: members if row < 19 else {**members, "txt": b"more"})
    with pytest.raises(CacheError, match=r"cache\.shard-changed-between-parts"):
        build(config)
