"""Objects are read, listed, published and copied by URL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.core.errors import StillroomError, StorageError, StorageInputError
from pipeline.student.data.local_store import NodeStore
from tests.errors import raises


@pytest.mark.parametrize("form", ["{folder}/x", "memory://limits/x"])
def test_a_file_above_a_limit_is_refused_and_one_at_it_is_read(form: str, tmp_path: Path) -> None:
    url = form.format(folder=tmp_path)
    storage.write(url, b"12345")
    assert storage.read(url, max_bytes=5) == b"12345"
    with raises("storage.too-large", got="5 bytes", expected="at most 4 bytes"):
        storage.read(url, max_bytes=4)


def test_a_written_object_can_be_read_and_has_its_size(base: str) -> None:
    url = storage.join(base, "deep", "a.bin")
    assert not storage.exists(url)
    storage.write(url, b"old and longer")
    storage.write(url, b"0123456789")
    assert storage.exists(url)
    assert storage.read(url) == b"0123456789"
    assert storage.size(url) == 10


def test_a_range_is_exact_or_an_error(base: str) -> None:
    url = storage.join(base, "a.bin")
    storage.write(url, b"0123456789")
    assert storage.read_range(url, 3, 4) == b"3456"
    assert storage.read_range(url, 6, 4) == b"6789"
    for offset, size_bytes in ((7, 4), (10, 1), (50, 1)):
        with raises("storage.object-too-short", StorageError):
            storage.read_range(url, offset, size_bytes)


def test_an_absent_object_is_bad_input_with_its_url(base: str) -> None:
    url = storage.join(base, "absent")
    for call in (storage.read, storage.size, lambda absent: storage.read_range(absent, 0, 1)):
        with raises("storage.missing-file", StorageInputError, where=url):
            call(url)


def test_listings_are_sorted_relative_and_deep(base: str) -> None:
    assert storage.listing(base) == []
    assert storage.sizes(base) == {}
    # The last one is of a killed writer.
    for name in ("b", "a/c.json", "a/b.json", "a.json", ".tmp-0123"):
        storage.write(storage.join(base, *name.split("/")), name.encode())
    assert storage.listing(base) == ["a.json", "a/b.json", "a/c.json", "b"]
    assert [*storage.sizes(base).items()][1:] == [("a.json", 6), ("a/b.json", 8), ("a/c.json", 8), ("b", 1)]
    for folder in ("a", "a/"):
        assert storage.listing(storage.join(base, folder)) == ["b.json", "c.json"]
        assert storage.sizes(storage.join(base, folder)) == {"b.json": 8, "c.json": 8}
    assert storage.sizes_in_folder(base) == {"a.json": 6, "b": 1, ".tmp-0123": 9}
    assert storage.folders(base) == ["a"]


def test_sizes_follow_links_and_refuse_a_broken_one(tmp_path: Path) -> None:
    storage.write(f"{tmp_path}/real/a", b"123")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert storage.sizes(str(tmp_path)) == {"link/a": 3, "real/a": 3}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "file").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "links" / "folder").symlink_to(tmp_path / "real")
    assert storage.sizes(f"{tmp_path}/links", links_out=True) == {"file": 3, "folder/a": 3}
    assert storage.folders(f"{tmp_path}/links") == ["folder"]
    (tmp_path / "links" / "broken").symlink_to(tmp_path / "gone")
    with raises("storage.missing-file"):
        storage.sizes(f"{tmp_path}/links", links_out=True)


@pytest.mark.parametrize("target", ["file", "folder", "../outside/file"])
def test_sizes_follow_a_link_out_of_the_folder_only_with_links_out(target: str, tmp_path: Path) -> None:
    storage.write(f"{tmp_path}/outside/file", b"mine")
    storage.write(f"{tmp_path}/tree/a", b"1")
    place = {"file": tmp_path / "outside" / "file", "folder": tmp_path / "outside"}.get(target, Path(target))
    (tmp_path / "tree" / "link").symlink_to(place)
    with raises("storage.link-out", where=f"{tmp_path}/tree/link"):
        storage.sizes(f"{tmp_path}/tree")
    assert sorted(storage.sizes(f"{tmp_path}/tree", links_out=True).values()) == [1, 4]


def test_a_cycle_of_links_is_refused(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        for number in range(8):
            (tmp_path / name / str(number)).symlink_to(tmp_path / other)
    with raises("storage.link-cycle"):
        storage.sizes(str(tmp_path), links_out=True)


def test_delete_is_idempotent(base: str) -> None:
    url = storage.join(base, "a")
    storage.write(url, b"x")
    storage.delete(url)
    storage.delete(url)
    assert not storage.exists(url)


def test_readers_see_an_old_object_or_a_new_one_and_never_a_part(tmp_path: Path) -> None:
    url = f"{tmp_path}/a"
    contents = {b"a" * 100_000, b"b" * 200_000}
    storage.write(url, b"a" * 100_000)
    done = threading.Event()

    def rewrite() -> None:
        for _ in range(20):
            for content in sorted(contents):
                storage.write(url, content)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(rewrite)
        while not done.is_set() and not writer.done():
            assert storage.read(url) in contents
        writer.result()


@pytest.mark.parametrize("name", ["absent", "local"])
def test_a_put_without_a_file_or_over_a_folder_leaves_no_temporary(name: str, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"x")
    (tmp_path / "store" / "a" / "full").mkdir(parents=True)
    with pytest.raises(StillroomError):
        storage.put(tmp_path / name, f"{tmp_path}/store/a")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["a"]


def test_a_local_copy_of_a_local_file_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"x")
    assert storage.local_copy(str(path), tmp_path / "scratch") == path
    assert not (tmp_path / "scratch").exists()
    with raises("storage.missing-file"):
        storage.local_copy(f"{tmp_path}/b.tar", tmp_path)


def test_a_remote_object_is_copied_once_for_all_threads(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/a.tar"
    storage.write(url, b"x" * 1000)
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: storage.local_copy(url, tmp_path / "scratch"), range(16)))
    (path,) = paths
    assert path.read_bytes() == b"x" * 1000
    assert path.name.endswith("a.tar")
    changed = path.stat().st_mtime_ns
    storage.local_copy(url, tmp_path / "scratch")
    assert path.stat().st_mtime_ns == changed
    storage.delete(url)


def test_a_folder_is_no_file_and_is_refused_instead_of_one(base: str, tmp_path: Path) -> None:
    storage.write(storage.join(base, "folder", "a"), b"x")
    folder = storage.join(base, "folder")
    assert not storage.exists(folder)
    for call in (storage.read, storage.size, lambda url: storage.local_copy(url, tmp_path / "scratch")):
        with raises("storage.is-folder"):
            call(folder)


def test_a_path_through_a_file_is_absent_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    for path in ("plain/a", "plain/b/a"):
        for call in (storage.write, storage.create):
            with raises("storage.file-in-path"):
                call(f"{tmp_path}/{path}", b"x")
        assert not storage.exists(f"{tmp_path}/{path}")


@pytest.mark.parametrize("name", ["t-*.tar", "t-?.tar", "t-[01].tar"])
def test_the_error_for_a_glob_without_a_file_suggests_braces(name: str, tmp_path: Path) -> None:
    url = f"{tmp_path}/{name}"
    for call in (storage.read, storage.size, lambda absent: storage.local_copy(absent, tmp_path)):
        with raises("storage.missing-file") as caught:
            call(url)
        assert "braces" in str(caught.value.next_step)
    storage.write(url, b"x")
    assert storage.read(url) == b"x"


def test_a_stamp_stays_until_the_file_is_replaced(tmp_path: Path) -> None:
    for url in (str(tmp_path / "weights.pt"), f"memory://{tmp_path.name}/weights.pt"):
        storage.write(url, b"one")
        first = storage.stamp(url)
        assert storage.stamp(url) == first
        storage.write(url, b"two")
        assert storage.stamp(url) != first
        storage.delete(url)
        with raises("storage.missing-file"):
            storage.stamp(url)


def test_a_name_that_is_too_long_is_bad_input(tmp_path: Path) -> None:
    url = str(tmp_path / ("n" * 256))
    for act in (lambda: storage.write(url, b"x"), lambda: storage.create(url, b"x"), lambda: storage.read(url)):
        with raises("storage.name-too-long"):
            act()


@pytest.mark.parametrize("letter", ["n", "ü", "語"])
def test_an_object_with_a_very_long_name_has_a_local_copy(letter: str, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/{letter * 400}.tar"
    storage.write(url, b"x")
    assert storage.local_copy(url, tmp_path / "copies").read_bytes() == b"x"
    with NodeStore(tmp_path / "store").acquire_url(url) as held:
        assert held.path.read_bytes() == b"x"
