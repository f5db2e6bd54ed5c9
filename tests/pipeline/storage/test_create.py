"""Create-if-absent: one of many creators wins, on every file system; the probe proves it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.core.errors import StorageError
from pipeline.storage import local_store
from tests.errors import raises
from tests.marks import slow


def test_create_writes_once_and_the_first_bytes_stay(base: str) -> None:
    url = storage.join(base, "commits", "a.json")
    assert storage.create(url, b"first")
    # As after a lost response.
    assert storage.create(url, b"first")
    assert not storage.create(url, b"second, and longer")
    assert storage.read(url) == b"first"
    assert storage.listing(base) == ["commits/a.json"]


def test_a_probe_leaves_nothing_behind(base: str, tmp_path: Path) -> None:
    storage.probe(storage.join(base, "deep", "cache"))
    storage.write(storage.join(base, "deep", "a"), b"x")
    storage.probe(storage.join(base, "deep"))
    assert storage.listing(base) == ["deep/a"]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a"] == []
    assert not (tmp_path / "store" / "deep" / "cache").exists()


def test_a_probe_through_a_file_or_of_a_read_only_protocol_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    with raises("storage.file-in-path"):
        storage.probe(f"{tmp_path}/plain/cache")
    with raises("storage.read-only-protocol"):
        storage.probe("https://host/cache")


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder that this process may read and not write; root changes its user for it."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "locked"
        folder.mkdir(mode=0o555)
        Path(parent).chmod(0o755)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(was)


def test_a_probe_where_nothing_may_be_written_is_refused(locked_folder: Path) -> None:
    for url in (f"{locked_folder}", f"{locked_folder}/deep/cache"):
        with raises("storage.permission-denied"):
            storage.probe(url)
    assert list(locked_folder.iterdir()) == []


def test_one_of_many_threads_creates_and_its_bytes_stay(base: str) -> None:
    num_threads = 16
    for attempt in range(8):
        url = storage.join(base, f"{attempt}.json")
        barrier = threading.Barrier(num_threads)

        def race(number: int, url: str = url, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return storage.create(url, b"%d" % number * 1000)

        with ThreadPoolExecutor(num_threads) as pool:
            won = list(pool.map(race, range(num_threads)))
        assert sum(won) == 1
        assert storage.read(url) == b"%d" % won.index(True) * 1000


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def no_hard_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of link(2) on vfat and exFAT, on SMB shares, and on FUSE file systems."""

    def link(source: Path, target: Path) -> None:
        raise OSError(request.param, os.strerror(request.param), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("no_hard_links")
def test_without_hard_links_the_first_creator_still_wins(tmp_path: Path) -> None:
    storage.probe(str(tmp_path / "new"))
    test_create_writes_once_and_the_first_bytes_stay(str(tmp_path / "a"))
    test_one_of_many_threads_creates_and_its_bytes_stay(str(tmp_path / "b"))
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [f"{attempt}.json" for attempt in range(8)]


@pytest.mark.usefixtures("no_hard_links")
def test_a_file_system_without_any_exclusive_create_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The result of exFAT over FUSE for every flag.
    monkeypatch.setattr(local_store, "renameat2_noreplace", lambda *_: errno.EINVAL)
    for call in (storage.probe, lambda folder: storage.create(f"{folder}/a", b"x")):
        with raises("storage.no-exclusive-create") as caught:
            call(str(tmp_path))
        assert caught.value.where == str(tmp_path)
        assert "hard links" in str(caught.value.got)
        assert "RENAME_NOREPLACE" in str(caught.value.got)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_hard_links")
def test_another_failure_of_the_rename_is_reported_as_that_of_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_store, "renameat2_noreplace", lambda *_: errno.ENOSPC)
    with raises("storage.disk-full", StorageError):
        storage.create(f"{tmp_path}/a", b"x")
    assert list(tmp_path.iterdir()) == []


def create_all_without_links(folder: str, number: int, num_files: int) -> list[bool]:
    def refuse(event: str, _: object) -> None:
        if event == "os.link":
            raise OSError(errno.EPERM, "Operation not permitted")

    sys.addaudithook(refuse)
    return create_all(folder, number, num_files)


def create_all(folder: str, number: int, num_files: int) -> list[bool]:
    return [storage.create(f"{folder}/{name}", b"%d" % number * 1000) for name in range(num_files)]


@pytest.mark.slow
@pytest.mark.parametrize("creates", [create_all, slow(create_all_without_links)])
def test_one_of_many_processes_creates_each_file_and_its_bytes_stay(creates: Any, tmp_path: Path) -> None:
    num_files, num_processes = 200, 3
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("forkserver")) as pool:
        racers = [pool.submit(creates, str(tmp_path), number, num_files) for number in range(num_processes)]
        outcomes = [racer.result() for racer in racers]
    for name, won in enumerate(zip(*outcomes, strict=True)):
        assert sum(won) == 1
        assert storage.read(f"{tmp_path}/{name}") == b"%d" % won.index(True) * 1000
    assert len(storage.listing(str(tmp_path))) == num_files == len(list(tmp_path.iterdir()))
