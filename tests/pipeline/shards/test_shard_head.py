from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from pipeline.core.errors import ShardError
from pipeline.shards.index import index_shard
from pipeline.shards.shard_head import read_shard_head
from tests.errors import raises
from tests.pipeline.shards.tars import data_config, image_bytes, make_tar


def shard_of(folder: Path, members: list[tuple[str, bytes]]) -> tuple[str, int]:
    path = folder / "a.tar"
    path.write_bytes(make_tar(members))
    return str(path), path.stat().st_size


def numbered(count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for row in range(count)
        for member in ((f"a/{row:03}.cls", b"%d\n" % row), (f"a/{row:03}.png", image_bytes(size=(40, 40))))
    ]


def test_a_shard_within_the_first_bytes_is_counted_with_its_labels(tmp_path: Path) -> None:
    url, size_bytes = shard_of(tmp_path, numbered(12))
    head = read_shard_head(url, data_config(), size_bytes=size_bytes)
    assert head.covered_bytes == size_bytes
    assert head.targets["label"].tolist() == list(range(12))


@pytest.mark.parametrize("first_bytes", [20_000, 20_480, 20_481, 33_333])
def test_only_complete_samples_of_the_first_bytes_count(tmp_path: Path, first_bytes: int) -> None:
    members = numbered(12)
    url, size_bytes = shard_of(tmp_path, members)
    head = read_shard_head(url, data_config(), size_bytes=size_bytes, first_bytes=first_bytes)
    assert 0 < head.num_samples < 12
    assert head.targets["label"].tolist() == list(range(head.num_samples))
    whole = make_tar(members[: 2 * head.num_samples]).rstrip(b"\0")
    assert head.covered_bytes == -(-len(whole) // 512) * 512 <= first_bytes


def test_a_sample_larger_than_the_first_bytes_is_still_found(tmp_path: Path) -> None:
    url, size_bytes = shard_of(tmp_path, numbered(3))
    assert read_shard_head(url, data_config(), size_bytes=size_bytes, first_bytes=600).num_samples >= 1


def test_samples_without_an_image_do_not_count_and_unreadable_labels_are_none(tmp_path: Path) -> None:
    members = [
        ("a.cls", b"1"),
        ("b.cls", b"x"),
        ("b.jpg", b"?"),
        ("c.jpg", b"?"),
        ("d.jpg", b"?"),
        ("d.cls", b" 7 "),
    ]
    url, size_bytes = shard_of(tmp_path, members)
    assert read_shard_head(url, data_config(), size_bytes=size_bytes).targets["label"].tolist() == [-1, -1, 7]


def test_a_shard_without_images_is_refused(tmp_path: Path) -> None:
    url, size_bytes = shard_of(tmp_path, [("a.cls", b"1"), ("b.txt", b"x")])
    with raises("shard.no-samples", ShardError, got="2 samples; members seen: 1 cls, 1 txt"):
        read_shard_head(url, data_config(), size_bytes=size_bytes)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_hidden_members_do_not_count_and_links_do(tmp_path: Path, kind: bytes) -> None:
    members: list[tuple[str, bytes | str]] = [
        ("d/.DS_Store", b"x"),
        ("d/a.jpg", image_bytes()),
        ("d/a.cls", b"3"),
        ("d/b.jpg", "d/a.jpg" if kind == tarfile.LNKTYPE else "a.jpg"),
        ("d/b.cls", "d/a.cls" if kind == tarfile.LNKTYPE else "a.cls"),
        ("d/gone.jpg", "d/nothing.jpg"),
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(members, kind=kind))
    head = read_shard_head(str(path), data_config(), size_bytes=path.stat().st_size)
    assert head.targets["label"].tolist() == [3, 3]
    index = index_shard(path, data_config(), where=str(path))
    assert index.ok_targets["label"].tolist() == head.targets["label"].tolist()
