"""The files of a node: created once, never read while incomplete, within the limit, whenever a process is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.core.errors import StorageError, StorageInputError
from pipeline.student.data.local_store import Fill, NodeStore, name_of
from tests.errors import raises

SIZES = {number: 100 * (number + 1) for number in range(6)}
HAMMER = """
import random, sys
from pathlib import Path
from pipeline.student.data.local_store import NodeStore
from tests.pipeline.student.data.test_local_store import SIZES, content, acquire
draw = random.Random(int(sys.argv[2]))
store = NodeStore(Path(sys.argv[1]), int(sys.argv[3]))
while True:
    number = draw.choice(list(SIZES))
    with acquire(store, number, slowly=True) as lease:
        assert lease.path.read_bytes() == content(number), number
    print(number, flush=True)
"""


def name(number: int) -> str:
    return name_of(f"file {number}", f"{number}.bin")


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZES[number])


def filling(number: int, *, slowly: bool = False) -> Fill:
    def make(part: Path) -> None:
        with part.open("wb") as file:
            for byte in (content(number)[:50], content(number)[50:]):
                file.write(byte)
                file.flush()
                if slowly:
                    time.sleep(0.002)

    return make


def acquire(store: NodeStore, number: int, *, slowly: bool = False):
    return store.acquire(name(number), SIZES[number], filling(number, slowly=slowly))


def stored_numbers(store: NodeStore) -> list[int]:
    """Numbers of the files in the folder."""
    return sorted(number for number in SIZES if (store.folder / name(number)).exists())


def total_bytes(numbers: Iterable[int]) -> int:
    return sum(SIZES[number] for number in numbers)


@pytest.fixture
def store(tmp_path: Path) -> NodeStore:
    return NodeStore(tmp_path / "store", 1000)


def test_a_file_is_created_once_for_all_threads(store: NodeStore) -> None:
    made: list[Path] = []

    def make(part: Path) -> None:
        made.append(part)
        filling(3, slowly=True)(part)

    def read(_: int) -> bytes:
        with store.acquire(name(3), 400, make) as lease:
            return lease.path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, range(32))) == {content(3)}
    assert len(made) == 1


@pytest.mark.slow
@settings(max_examples=100)
@given(st.data())
def test_the_least_recently_used_files_are_removed_first_and_files_in_use_stay(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Against a list in order of use; sizes are 100 to 600."""
    limit = data.draw(st.integers(1, 2200))
    store = NodeStore(tmp_path_factory.mktemp("law"), limit)
    model, in_use = list[int](), dict[int, list[object]]()
    for number in data.draw(st.lists(st.sampled_from([*SIZES]), max_size=25)):
        if number not in model:
            room = [*model, number]
            for old in model:
                if total_bytes(room) <= limit:
                    break
                if old not in in_use:
                    room.remove(old)
            model = room[:-1]
        lease = acquire(store, number)
        assert lease.over_budget == (number not in model and total_bytes({*model, number}) > limit)
        model = [*(stored for stored in model if stored != number), number]
        assert stored_numbers(store) == sorted(model)
        if data.draw(st.booleans()) and not lease.over_budget:
            in_use.setdefault(number, []).append(lease)
            continue
        lease.close()
        if lease.over_budget:
            for old in list(model):
                if total_bytes(model) <= limit:
                    break
                if old not in in_use:
                    model.remove(old)
    assert stored_numbers(store) == sorted(model)
    for leases in in_use.values():
        for lease in leases:
            lease.close()


def test_a_file_above_the_limit_is_used_and_then_removed(store: NodeStore) -> None:
    small = NodeStore(store.folder, 350)
    with acquire(small, 5) as lease:
        assert lease.over_budget
        assert lease.path.read_bytes() == content(5)
    assert stored_numbers(small) == []
    with acquire(small, 0) as lease:
        assert not lease.over_budget
    assert stored_numbers(small) == [0]


def test_a_partial_file_counts_with_its_final_size(store: NodeStore) -> None:
    """Otherwise several downloads that start at the same time would share the free space of one."""
    crowded: list[bool] = []

    def make(part: Path) -> None:
        for number in (0, 4):
            with acquire(store, number) as lease:
                crowded.append(lease.over_budget)
        filling(5)(part)

    store.acquire(name(5), 600, make).close()
    assert crowded == [False, True]


def test_a_partial_file_of_a_killed_process_is_filled_again_or_removed(store: NodeStore) -> None:
    store.folder.mkdir()
    leftovers = [store.folder / f".part-{SIZES[number]}-{name(number)}" for number in (1, 2)]
    for part in leftovers:
        part.write_bytes(b"half")
    with acquire(store, 1) as lease:
        assert lease.path.read_bytes() == content(1)
    assert not any(part.exists() for part in leftovers)


def test_a_failure_leaves_nothing_and_the_next_one_tries_again(store: NodeStore) -> None:
    def fail(part: Path) -> None:
        part.write_bytes(b"half")
        raise StorageError("no")

    with pytest.raises(StorageError, match="no"):
        store.acquire(name(1), 200, fail)
    assert [path.name for path in store.folder.iterdir()] == [".lock"]
    assert acquire(store, 1).path.read_bytes() == content(1)


def test_other_files_in_the_folder_are_never_removed(store: NodeStore) -> None:
    store.folder.mkdir()
    for foreign in ("thesis.tex", ".part-of-life", "0123456789abcdef"):
        (store.folder / foreign).write_bytes(b"x" * 5000)
    acquire(NodeStore(store.folder, 1), 1).close()
    assert len(list(store.folder.iterdir())) == 4


def test_a_discarded_copy_is_created_again_and_that_of_another_process_stays(store: NodeStore) -> None:
    first, second = acquire(store, 1), acquire(store, 1)
    first.path.write_bytes(b"damaged")
    first.discard()
    assert stored_numbers(store) == []
    third = acquire(store, 1)
    second.discard()
    assert stored_numbers(store) == [1]
    assert third.path.read_bytes() == content(1)
    third.close()


def test_the_folder_of_another_user_is_refused(store: NodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.folder.mkdir()
    owner = store.folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with raises("storage.foreign-folder"):
        acquire(store, 1)


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageInputError, match="a part of this path is a file"):
        acquire(NodeStore(tmp_path / "file" / "store"), 1)


def test_without_a_limit_a_fifth_of_the_free_space_is_left(store: NodeStore) -> None:
    store.folder.mkdir()
    free = os.statvfs(store.folder)
    limit = NodeStore(store.folder).limit()
    assert limit == pytest.approx(0.8 * free.f_bavail * free.f_frsize, rel=0.05)


def test_a_remote_object_is_copied_and_a_local_one_is_itself(store: NodeStore, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/a.tar"
    storage.write(url, b"x" * 900)
    (tmp_path / "b.tar").write_bytes(b"y")
    with store.acquire_url(url) as lease, store.acquire_url(str(tmp_path / "b.tar")) as local:
        assert lease.path.read_bytes() == b"x" * 900
        assert (lease.path.parent, local.path) == (store.folder, tmp_path / "b.tar")
    local.discard()
    assert (tmp_path / "b.tar").exists()
    with raises("storage.missing-file"):
        store.acquire_url(f"memory://{tmp_path.name}/none.tar")
    storage.delete(url)


def test_a_copy_that_lost_its_end_with_the_node_s_power_is_fetched_again(store: NodeStore, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/a.tar"
    storage.write(url, b"x" * 900)
    lease = store.acquire_url(url)
    lease.close()
    lease.path.write_bytes(b"x" * 512)
    with store.acquire_url(url) as again:
        assert again.path.read_bytes() == b"x" * 900
    storage.delete(url)


def test_a_download_that_is_cut_short_each_time_leaves_nothing(
    store: NodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}/a.tar"
    storage.write(url, b"x" * 900)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "get_file", lambda _, _path, target: Path(target).write_bytes(b"x" * 5))
    with raises("storage.truncated-download"):
        store.acquire_url(url)
    assert [path.name for path in store.folder.iterdir()] == [".lock"]
    storage.delete(url)


@pytest.mark.slow
def test_processes_that_are_killed_at_any_moment_leave_right_files_within_the_limit(tmp_path: Path) -> None:
    store, draw = NodeStore(tmp_path / "store", 1300), random.Random(0)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HAMMER, str(store.folder), str(draw.randrange(10**6)), str(store.limit_bytes)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    workers = [start() for _ in range(4)]
    try:
        for _ in range(8):
            victim = draw.randrange(len(workers))
            assert workers[victim].stdout is not None
            # The writer is running, so the kill interrupts it.
            assert workers[victim].stdout.readline()
            time.sleep(draw.random() * 0.02)
            workers[victim].send_signal(signal.SIGKILL)
            assert workers[victim].wait() == -signal.SIGKILL
            workers[victim].stdout.close()
            workers[victim] = start()
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline()
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert store.shrink()
    assert all(path.name == ".lock" or not path.name.startswith(".") for path in store.folder.iterdir())
    for number in stored_numbers(store):
        assert (store.folder / name(number)).read_bytes() == content(number)
    for number in SIZES:
        with acquire(store, number) as lease:
            assert lease.path.read_bytes() == content(number)
    assert total_bytes(stored_numbers(store)) <= 1300
