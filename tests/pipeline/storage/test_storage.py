from __future__ import annotations

import errno
import http.server
import multiprocessing
import os
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import aiohttp
import botocore.exceptions
import fsspec
import pytest
import tenacity
from fsspec.asyn import AsyncFileSystem
from s3fs.errors import translate_boto_error

from pipeline import storage
from pipeline.cache.format.files import read_file
from pipeline.core.errors import MissingPackageError, StorageError, StorageInputError, TransientStorageError
from pipeline.storage import failures, local_store
from pipeline.storage.config_files import load_config
from pipeline.student.data.local_store import NodeStore
from tests.marks import slow


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once."""
    monkeypatch.setattr(failures.PAUSE, "multiplier", 0)


@pytest.fixture(params=["file", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield str(tmp_path / "store")
        return
    yield f"memory://{tmp_path.name}"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(f"/{tmp_path.name}"):
        filesystem.rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("a/b.tar", "file"),
        ("/a/b:c.tar", "file"),
        ("/s3:/a", "file"),
        ("a/s3:b.tar", "file"),
        ("./s3:b.tar", "file"),
        ("../2020-01-01T00:00/a", "file"),
        ("memory:///a", "memory"),
        ("file:///a", "file"),
        ("hf://datasets/x/y", "hf"),
        ("https://host/a?b=c", "https"),
        ("memory://a", "memory"),
        ("abfss://c@account/a", "abfss"),
    ],
)
def test_allowed_urls_have_a_protocol(url: str, name: str) -> None:
    assert storage.protocol(url) == name


REFUSED = [
    "pipe:cat /etc/passwd",
    "PIPE:cat x",
    "cmd:x",
    "python:os:system",
    "github://owner:name@/a",
    " s3://bucket/a",
    "\uff53\uff13://bucket/a",
    "filecache::s3://bucket/a",
    "pipe://cat x",
    "simplecache::s3://bucket/a",
    "zip://a.jpg::s3://bucket/a.zip",
    "a::b",
    "ssh://host/a",
    "ftp://host/a",
    "sftp://host/a",
    "reference://a",
    "local://a",
    "dir://a",
    "://a",
    "",
    "  ",
    "s3://",
    "s3:///x",
    "gs:///x",
    "https:///x",
    "s3://key:secret@/x",
    "s3:/bucket/x",
    "s3:x",
    "file:relative",
    "host.name:path",
    "a\0b",
]


@pytest.mark.parametrize("url", REFUSED)
def test_chained_command_and_unknown_urls_are_refused_by_every_call(url: str, tmp_path: Path) -> None:
    calls = (
        storage.protocol,
        storage.exists,
        storage.read,
        storage.listing,
        storage.delete,
        storage.expand,
        lambda refused: storage.write(refused, b""),
        lambda refused: storage.create(refused, b""),
        lambda refused: storage.local_copy(refused, tmp_path),
    )
    for call in calls:
        with pytest.raises(StorageInputError, match="refused"):
            call(url)


@pytest.mark.parametrize("url", ["https://host/a", "http://host/a", "hf://datasets/x"])
def test_read_only_protocols_are_never_written(url: str) -> None:
    for call in (storage.write, storage.create):
        with pytest.raises(StorageInputError, match="read-only"):
            call(url, b"")


# Protocols of stores whose package may be missing, and the extra that has it.
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "hf": "hf"}
PACKAGES = {"s3": "s3fs", "gcs": "gcsfs", "azure": "adlfs", "hf": "huggingface_hub"}


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any optional store: importing one fails as it does where it is not installed."""
    for name in PACKAGES.values():
        monkeypatch.setitem(sys.modules, name, None)
    for protocol in EXTRAS:
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize("protocol", EXTRAS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(protocol: str, tmp_path: Path) -> None:
    url = f"{protocol}://container@account/a" if protocol.startswith("abfs") else f"{protocol}://bucket/a/b"
    calls = (
        storage.read,
        storage.size,
        lambda url: storage.local_copy(url, tmp_path),
        load_config,
        lambda url: read_file(url, "header.json"),
    )
    for call in calls:
        with pytest.raises(MissingPackageError) as caught:
            call(url)
        assert caught.value.code == "storage.missing-package"
        assert str(caught.value.next_step).startswith(f"pip install 'stillroom[{EXTRAS[protocol]}]'")


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize("protocol", ["gs", "az"])
def test_no_package_is_wanted_for_what_its_store_cannot_do(protocol: str) -> None:
    with pytest.raises(StorageInputError, match="no create-if-absent"):
        storage.create(f"{protocol}://bucket/a", b"")


def test_every_extra_that_is_named_is_one_of_the_package() -> None:
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    for extra, package in PACKAGES.items():
        (requirement,) = extras["optional-dependencies"][extra]
        assert requirement.partition(">")[0].replace("-", "_") == package


@pytest.mark.parametrize("path", ["../x", "a/../../x", "..", "a/.."])
def test_no_path_leads_out_of_the_folder_that_it_is_joined_to(path: str) -> None:
    with pytest.raises(StorageInputError, match="leads out of its folder"):
        storage.join("s3://bucket/cache", path)
    assert storage.join("s3://bucket/cache", "a..b/..c/d..") == "s3://bucket/cache/a..b/..c/d.."


@pytest.mark.parametrize("form", ["{folder}/x", "memory://limits/x"])
def test_a_file_above_a_limit_is_refused_and_one_at_it_is_read(form: str, tmp_path: Path) -> None:
    url = form.format(folder=tmp_path)
    storage.write(url, b"12345")
    assert storage.read(url, max_bytes=5) == b"12345"
    with pytest.raises(StorageInputError, match=r"too large(.|\n)*got: +5 bytes(.|\n)*at most 4 bytes"):
        storage.read(url, max_bytes=4)


def test_braces_expand_in_the_order_written() -> None:
    assert storage.expand("s3://b/t-{00..02}.tar") == ["s3://b/t-00.tar", "s3://b/t-01.tar", "s3://b/t-02.tar"]
    assert storage.expand(("b{1,0}.tar", "a.tar")) == ["b1.tar", "b0.tar", "a.tar"]


def test_an_open_brace_and_a_refused_protocol_inside_braces_are_errors() -> None:
    with pytest.raises(StorageInputError, match="brace"):
        storage.expand("t-{00..02.tar")
    with pytest.raises(StorageInputError, match="refused"):
        storage.expand("{s3,ssh}://b/t.tar")


def test_what_is_written_is_read_and_sized(base: str) -> None:
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
        with pytest.raises(StorageError, match="shorter"):
            storage.read_range(url, offset, size_bytes)


def test_an_absent_object_is_bad_input_with_its_url(base: str) -> None:
    url = storage.join(base, "absent")
    for call in (storage.read, storage.size, lambda absent: storage.read_range(absent, 0, 1)):
        with pytest.raises(StorageInputError, match="absent"):
            call(url)


def test_listing_is_sorted_relative_and_deep(base: str) -> None:
    assert storage.listing(base) == []
    for name in ("b", "a/c.json", "a/b.json", "a.json"):
        storage.write(storage.join(base, *name.split("/")), b"x")
    assert storage.listing(base) == ["a.json", "a/b.json", "a/c.json", "b"]
    assert storage.listing(storage.join(base, "a")) == ["b.json", "c.json"]
    assert storage.listing(storage.join(base, "a/")) == ["b.json", "c.json"]


def test_sizes_tell_the_bytes_of_every_object_by_its_relative_path(base: str) -> None:
    assert storage.sizes(base) == {}
    for name in ("b", "a/c.json", "a/b.json"):
        storage.write(storage.join(base, *name.split("/")), name.encode())
    assert list(storage.sizes(base).items()) == [("a/b.json", 8), ("a/c.json", 8), ("b", 1)]
    assert storage.sizes(storage.join(base, "a/")) == {"b.json": 8, "c.json": 8}


def test_sizes_follow_links_and_name_one_that_leads_nowhere(tmp_path: Path) -> None:
    storage.write(f"{tmp_path}/real/a", b"123")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert storage.sizes(str(tmp_path)) == {"link/a": 3, "real/a": 3}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "file").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "links" / "folder").symlink_to(tmp_path / "real")
    assert storage.sizes(f"{tmp_path}/links", links_out=True) == {"file": 3, "folder/a": 3}
    assert storage.folders(f"{tmp_path}/links") == ["folder"]
    (tmp_path / "links" / "broken").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageInputError, match="no such file"):
        storage.sizes(f"{tmp_path}/links", links_out=True)


@pytest.mark.parametrize("target", ["file", "folder", "../outside/file"])
def test_sizes_follow_no_link_out_of_the_folder_unless_they_are_asked_to(target: str, tmp_path: Path) -> None:
    storage.write(f"{tmp_path}/outside/file", b"mine")
    storage.write(f"{tmp_path}/tree/a", b"1")
    place = {"file": tmp_path / "outside" / "file", "folder": tmp_path / "outside"}.get(target, Path(target))
    (tmp_path / "tree" / "link").symlink_to(place)
    with pytest.raises(StorageInputError, match=r"leads out of this folder(.|\n)*tree/link(.|\n)*--links-out"):
        storage.sizes(f"{tmp_path}/tree")
    assert sorted(storage.sizes(f"{tmp_path}/tree", links_out=True).values()) == [1, 4]


def test_links_in_circles_are_told_and_not_followed_for_ever(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        for number in range(8):
            (tmp_path / name / str(number)).symlink_to(tmp_path / other)
    with pytest.raises(StorageInputError, match="a folder that it is in"):
        storage.sizes(str(tmp_path), links_out=True)


def test_folders_are_those_right_below(base: str) -> None:
    for name in ("b/x/y", "a/c", "d"):
        storage.write(storage.join(base, *name.split("/")), b"x")
    assert storage.folders(base) == ["a", "b"]


def test_the_local_folder_of_a_url_is_the_nearest_that_exists(tmp_path: Path) -> None:
    assert storage.local_folder(f"{tmp_path}/a/b") == tmp_path
    assert storage.local_folder(f"file://{tmp_path}") == tmp_path
    assert storage.local_folder("s3://bucket/a") is None
    assert storage.local_folder("memory://a") is None


def test_listing_passes_over_what_a_killed_writer_left(tmp_path: Path) -> None:
    storage.write(f"{tmp_path}/a", b"x")
    (tmp_path / ".tmp-0123").write_bytes(b"half")
    assert storage.listing(str(tmp_path)) == ["a"]


def test_delete_is_idempotent(base: str) -> None:
    url = storage.join(base, "a")
    storage.write(url, b"x")
    storage.delete(url)
    storage.delete(url)
    assert not storage.exists(url)


def test_create_writes_once_and_keeps_the_first(base: str) -> None:
    url = storage.join(base, "commits", "a.json")
    assert storage.create(url, b"first")
    assert not storage.create(url, b"second, and longer")
    assert storage.read(url) == b"first"
    assert storage.listing(base) == ["commits/a.json"]


def test_who_finds_its_own_bytes_has_created_them(base: str) -> None:
    url = storage.join(base, "a.json")
    assert storage.create(url, b"same")
    assert storage.create(url, b"same")
    assert not storage.create(url, b"other")


def test_a_probe_leaves_nothing_behind(base: str, tmp_path: Path) -> None:
    storage.probe(storage.join(base, "deep", "cache"))
    storage.write(storage.join(base, "deep", "a"), b"x")
    storage.probe(storage.join(base, "deep"))
    assert storage.listing(base) == ["deep/a"]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a"] == []
    assert not (tmp_path / "store" / "deep" / "cache").exists()


def test_a_probe_through_a_file_or_of_a_read_only_protocol_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    with pytest.raises(StorageInputError, match="a part of this path is a file"):
        storage.probe(f"{tmp_path}/plain/cache")
    with pytest.raises(StorageInputError, match="read-only"):
        storage.probe("https://host/cache")


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder that this process may read and not write; root lays its powers down for it."""
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
        with pytest.raises(StorageInputError, match="cannot create: permission denied"):
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
    """What link(2) answers on vfat and exFAT, on SMB shares, and on FUSE file systems."""

    def link(source: Path, target: Path) -> None:
        raise OSError(request.param, os.strerror(request.param), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("no_hard_links")
def test_without_hard_links_the_first_creator_still_wins(tmp_path: Path) -> None:
    storage.probe(str(tmp_path / "new"))
    test_create_writes_once_and_keeps_the_first(str(tmp_path / "a"))
    test_one_of_many_threads_creates_and_its_bytes_stay(str(tmp_path / "b"))
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [f"{attempt}.json" for attempt in range(8)]


@pytest.mark.usefixtures("no_hard_links")
def test_a_file_system_without_any_exclusive_create_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FUSE's exFAT answers this to every flag, and a C library without the function is as good as one.
    monkeypatch.setattr(local_store, "renameat2_noreplace", lambda *_: errno.EINVAL)
    for call in (storage.probe, lambda folder: storage.create(f"{folder}/a", b"x")):
        with pytest.raises(StorageInputError) as caught:
            call(str(tmp_path))
        assert (caught.value.code, caught.value.where) == ("storage.no-exclusive-create", str(tmp_path))
        assert "hard links" in str(caught.value.got)
        assert "RENAME_NOREPLACE" in str(caught.value.got)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_hard_links")
def test_other_failures_of_the_rename_are_those_of_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_store, "renameat2_noreplace", lambda *_: errno.ENOSPC)
    with pytest.raises(StorageError, match="no space is left"):
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


def test_a_put_that_fails_leaves_neither_temporary_nor_target(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(StorageInputError):
        storage.put(tmp_path / "absent", str(store / "a"))
    assert list(store.iterdir()) == []


def test_a_put_that_cannot_replace_its_target_leaves_no_temporary(tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(b"x")
    (tmp_path / "store" / "a" / "full").mkdir(parents=True)
    with pytest.raises((StorageInputError, StorageError)):
        storage.put(local, f"{tmp_path}/store/a")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["a"]


def test_a_local_copy_of_a_local_file_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"x")
    assert storage.local_copy(str(path), tmp_path / "scratch") == path
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(StorageInputError, match="no such file"):
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


def test_a_relative_path_becomes_absolute_and_a_url_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b") == f"{tmp_path}/a/b"
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a working directory that is another one."""
    for name in ("home", "cwd"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "home"


def test_a_leading_tilde_is_the_home_folder_in_every_call(home: Path) -> None:
    storage.write("~/a/x", b"1")
    assert storage.create("~/a/y", b"2")
    assert (home / "a" / "x").read_bytes() == b"1"
    assert storage.read("~/a/x") == storage.read_range("~/a/x", 0, 1) == b"1"
    assert storage.listing("~/a") == ["x", "y"]
    assert storage.local_path("~/a") == storage.local_folder("~/a/new") == home / "a"
    assert storage.absolute("~/a") == str(home / "a")
    assert storage.expand(("~/a{0,1}", "{~/b,~/c}")) == [f"{home}/{name}" for name in ("a0", "a1", "b", "c")]
    assert not any(Path.cwd().iterdir())


def test_a_tilde_inside_a_path_or_url_is_a_letter(home: Path) -> None:
    storage.write("./~/x", b"1")
    storage.write("a~", b"2")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["a~", "~"]
    assert storage.absolute("./~/x") == f"{Path.cwd()}/~/x"
    assert storage.absolute("s3://bucket/~/x") == "s3://bucket/~/x"
    assert not any(home.iterdir())


@pytest.mark.usefixtures("home")
def test_the_home_of_an_unknown_user_is_refused_and_never_a_folder() -> None:
    calls = (storage.absolute, storage.expand, storage.exists, lambda path: storage.write(path, b""))
    for call in calls:
        with pytest.raises(StorageInputError) as caught:
            call("~nobody-of-this-name/x")
        assert (caught.value.code, caught.value.got) == ("storage.unknown-home", "~nobody-of-this-name")
    assert not any(Path.cwd().iterdir())


def test_alternatives_of_whole_paths_are_absolute_each_by_itself(home: Path) -> None:
    cwd = Path.cwd()
    assert storage.absolute_patterns("a/{00..99}.tar") == f"{cwd}/a/{{00..99}}.tar"
    assert storage.absolute_patterns("{00..99}.tar") == f"{cwd}/{{00..99}}.tar"
    found = storage.absolute_patterns(("{~/a,/b,c,s3://d}/{0..1}.tar", "e"))
    folders = (f"{home}/a", "/b", f"{cwd}/c", "s3://d")
    assert found == (*(f"{folder}/{number}.tar" for folder in folders for number in (0, 1)), f"{cwd}/e")


@pytest.mark.parametrize("url", ["file://relative/x", "file://localhost/x", "file://~/x"])
def test_a_file_url_names_no_host(url: str) -> None:
    with pytest.raises(StorageInputError) as caught:
        storage.read(url)
    assert caught.value.code == "storage.file-url-with-host"


def test_a_refused_url_tells_what_is_wrong_with_it() -> None:
    for url, told in (
        ("", "an empty URL"),
        ("s3:///x", "without a bucket"),
        ("s3:/x", "without the two slashes"),
        ("file:relative", "without the two slashes"),
        ("ssh://host/a", "protocol 'ssh'"),
        ("a::b", "chained"),
    ):
        with pytest.raises(StorageInputError, match=told):
            storage.protocol(url)


@pytest.mark.parametrize(
    ("base", "joined"),
    [
        ("s3://bucket/", "s3://bucket/a/b"),
        ("s3://", "s3:///a/b"),
        ("memory://", "memory:///a/b"),
        ("file:///", "file:///a/b"),
        ("/", "/a/b"),
        ("folder//", "folder/a/b"),
    ],
)
def test_join_keeps_the_slashes_of_a_protocol(base: str, joined: str) -> None:
    assert storage.join(base, "a", "b") == joined


class FailingStore(AsyncFileSystem):
    """A remote store that fails ``num_failures`` times; it has every file that is asked for, and a stale listing."""

    failure: ClassVar[Exception | None] = None
    num_failures: ClassVar[float] = float("inf")
    num_asked: ClassVar[int] = 0
    cachable = False

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        cls = type(self)
        cls.num_asked += 1
        if self.failure is not None and self.num_asked <= self.num_failures:
            raise self.failure
        if self._parent(path) in self.dircache:
            raise FileNotFoundError(path)
        return {"name": path, "size": 1, "type": "file"}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        del start, end
        await self._info(path)
        return b"x"

    async def _find(self, path: str, **_: Any) -> dict[str, Any]:
        try:
            return {path: await self._info(path)}
        except FileNotFoundError:
            return {}

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.pop(path, None)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FailingStore:
    filesystem = FailingStore()
    for name, value in (("failure", None), ("num_failures", float("inf")), ("num_asked", 0)):
        monkeypatch.setattr(FailingStore, name, value)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (filesystem, url.partition("://")[2]))
    return filesystem


def failing(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingStore, "failure", failure)


def status_error(status: int) -> aiohttp.ClientResponseError:
    info = aiohttp.RequestInfo("https://host/a?token=hidden", "GET", None)  # pyright: ignore[reportArgumentType]
    return aiohttp.ClientResponseError(info, (), status=status, message="no")


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (PermissionError("403"), StorageInputError),
        (OSError(errno.EBUSY, "503 slow down"), StorageError),
        (status_error(503), StorageError),
        (botocore.exceptions.NoCredentialsError(), StorageInputError),
    ],
)
def test_a_store_that_cannot_tell_is_never_an_absent_file(
    store: FailingStore, failure: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(failure, monkeypatch)
    assert store.isfile("bucket/a") is False
    for call in (storage.exists, storage.listing, storage.read_if_exists):
        with pytest.raises(kind, match="s3://bucket/a"):
            call("s3://bucket/a")


@pytest.mark.usefixtures("store")
def test_a_missing_object_is_absent_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(FileNotFoundError("bucket/a"), monkeypatch)
    assert not storage.exists("s3://bucket/a")
    assert storage.listing("s3://bucket/a") == []
    assert storage.read_if_exists("s3://bucket/a") is None


def test_a_new_object_is_seen_past_a_cached_listing(store: FailingStore) -> None:
    store.dircache["bucket"] = []
    assert storage.exists("s3://bucket/a")


def test_a_folder_is_no_file_and_a_path_through_a_file_is_absent(base: str, tmp_path: Path) -> None:
    storage.write(storage.join(base, "folder", "a"), b"x")
    assert not storage.exists(storage.join(base, "folder"))
    (tmp_path / "plain").write_bytes(b"x")
    assert not storage.exists(f"{tmp_path}/plain/a")


@pytest.mark.parametrize(
    ("failure", "kind", "told"),
    [
        (botocore.exceptions.NoCredentialsError(), StorageInputError, "credentials"),
        (botocore.exceptions.PartialCredentialsError(provider="env", cred_var="x"), StorageInputError, "credentials"),
        (botocore.exceptions.CredentialRetrievalError(provider="x", error_msg="x"), StorageInputError, "credentials"),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), StorageError, "could not connect"),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"), StorageError, "ReadTimeoutError"),
        (aiohttp.ServerDisconnectedError(), StorageError, "ServerDisconnectedError"),
        (status_error(403), StorageInputError, "permission denied"),
        (status_error(500), StorageError, "500"),
        (ConnectionRefusedError(), StorageError, "could not connect"),
        (FileExistsError(), StorageInputError, "a part of this path is a file"),
        (NotADirectoryError(), StorageInputError, "a part of this path is a file"),
        (IsADirectoryError(), StorageInputError, "is a folder"),
        (OSError(errno.EROFS, "read-only"), StorageInputError, "file system is read-only"),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "No space left"),
    ],
)
@pytest.mark.usefixtures("store")
def test_each_failure_of_a_library_is_told_as_ours(
    failure: Exception, kind: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(failure, monkeypatch)
    with pytest.raises(kind, match=told) as caught:
        storage.read("s3://bucket/a")
    assert "s3://bucket/a" in str(caught.value)
    assert "hidden" not in str(caught.value)


def client_error(code: str, status: int) -> OSError:
    """As s3fs tells what S3 answered."""
    answer: Any = {"Error": {"Code": code, "Message": "told"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(botocore.exceptions.ClientError(answer, "GetObject"))


PASSING = [
    client_error("InternalError", 500),
    client_error("SlowDown", 503),
    client_error("ServiceUnavailable", 503),
    client_error("503", 503),
    client_error("RequestTimeout", 400),
    client_error("BadDigest", 400),
    client_error("ConditionalRequestConflict", 409),
    client_error("NoSuchUpload", 404),
    client_error("429", 429),
    status_error(500),
    status_error(429),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError(),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    fsspec.exceptions.FSTimeoutError(),
    ConnectionResetError(),
    OSError(errno.ESTALE, "stale handle"),
]
LASTING = [
    (client_error("NoSuchKey", 404), StorageInputError),
    (client_error("NoSuchBucket", 404), StorageInputError),
    (client_error("AccessDenied", 403), StorageInputError),
    (client_error("InvalidRequest", 400), StorageError),
    (client_error("NotImplemented", 501), StorageError),
    (botocore.exceptions.NoCredentialsError(), StorageInputError),
    (status_error(404), StorageError),
    (aiohttp.InvalidURL("x"), StorageError),
    (OSError(errno.ENOSPC, "full"), StorageError),
    (OSError(errno.EDQUOT, "full"), StorageError),
    (OSError(errno.EINVAL, "invalid"), StorageError),
]


@pytest.mark.parametrize("failure", PASSING, ids=lambda failure: f"{type(failure).__name__} {failure}"[:40])
@pytest.mark.usefixtures("store")
def test_what_may_pass_is_tried_again_and_a_bounded_number_of_times(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(failure, monkeypatch)
    with pytest.raises(TransientStorageError):
        storage.size("s3://bucket/a")
    assert FailingStore.num_asked == 5
    monkeypatch.setattr(FailingStore, "num_asked", 0)
    monkeypatch.setattr(FailingStore, "num_failures", 4)
    assert storage.size("s3://bucket/a") == 1
    assert FailingStore.num_asked == 5


@pytest.mark.parametrize(("failure", "kind"), LASTING, ids=lambda value: f"{value}"[:40])
@pytest.mark.usefixtures("store")
def test_what_lasts_is_told_at_once(failure: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(failure, monkeypatch)
    with pytest.raises(kind) as caught:
        storage.size("s3://bucket/a")
    assert not isinstance(caught.value, TransientStorageError)
    assert FailingStore.num_asked == 1


def test_a_store_that_never_recovers_is_given_up_within_a_minute(
    store: FailingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that runs 40 s an attempt."""
    ticks = iter(range(0, 4000, 40))
    monkeypatch.setattr(tenacity, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    failing(ConnectionResetError(), monkeypatch)
    with pytest.raises(TransientStorageError):
        storage.read("s3://bucket/a")
    assert store.num_asked == 2


@pytest.mark.usefixtures("store")
def test_a_name_that_a_store_does_not_take_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ValueError("Failed to list path")
    refused.__context__ = botocore.exceptions.ParamValidationError(report="Invalid bucket name")
    failing(refused, monkeypatch)
    with pytest.raises(StorageInputError, match="does not take this name"):
        storage.exists("s3://a bucket/a")


@pytest.mark.usefixtures("store")
def test_missing_credentials_come_with_a_next_step_and_bugs_stay_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(botocore.exceptions.NoCredentialsError(), monkeypatch)
    with pytest.raises(StorageInputError, match=r"next: +set the credentials"):
        storage.size("s3://bucket/a")
    failing(ZeroDivisionError("ours"), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        storage.size("s3://bucket/a")


class InferenceOutputs(http.server.BaseHTTPRequestHandler):
    """The status that the path names."""

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:4]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Tests read no log."""


@pytest.fixture
def host() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), InferenceOutputs) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_over_http_only_a_404_is_a_missing_file(host: str, tmp_path: Path) -> None:
    reads = (storage.read, storage.size, lambda url: storage.local_copy(url, tmp_path))
    assert not storage.exists(f"{host}/404")
    for call in reads:
        with pytest.raises(StorageInputError, match="no such file"):
            call(f"{host}/404")
    for call in (storage.exists, *reads):
        with pytest.raises(StorageInputError, match="permission denied"):
            call(f"{host}/403")
        with pytest.raises(StorageError, match="503") as caught:
            call(f"{host}/503?token=hidden")
        assert "hidden" not in str(caught.value)


def test_a_refused_connection_is_not_a_missing_file(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), InferenceOutputs) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/a"
    for call in (storage.exists, storage.read, storage.size, lambda gone: storage.local_copy(gone, tmp_path)):
        with pytest.raises(StorageError, match="could not connect"):
            call(url)


def test_a_folder_where_a_file_is_wanted_is_told(base: str, tmp_path: Path) -> None:
    storage.write(storage.join(base, "folder", "a"), b"x")
    folder = storage.join(base, "folder")
    for call in (storage.read, storage.size, lambda url: storage.local_copy(url, tmp_path / "scratch")):
        with pytest.raises(StorageInputError, match="is a folder"):
            call(folder)


def test_a_write_through_a_file_tells_that_a_part_of_the_path_is_one(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    for path in ("plain/a", "plain/b/a"):
        for call in (storage.write, storage.create):
            with pytest.raises(StorageInputError, match="a part of this path is a file"):
                call(f"{tmp_path}/{path}", b"x")


@pytest.mark.parametrize("name", ["t-*.tar", "t-?.tar", "t-[01].tar"])
def test_a_glob_that_names_no_file_is_told_to_be_braces(name: str, tmp_path: Path) -> None:
    url = f"{tmp_path}/{name}"
    for call in (storage.read, storage.size, lambda absent: storage.local_copy(absent, tmp_path)):
        with pytest.raises(StorageInputError, match="globs are not expanded; use braces"):
            call(url)
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
        with pytest.raises(StorageInputError, match="no such file"):
            storage.stamp(url)


def test_a_scheme_in_capitals_is_refused_with_the_right_spelling() -> None:
    for url in ("S3://bucket/a", "File:///tmp/a"):
        with pytest.raises(StorageInputError) as caught:
            storage.protocol(url)
        assert caught.value.code == "storage.scheme-not-lower-case"
        assert url.partition("://")[0].lower() in str(caught.value.next_step)


def test_a_name_that_is_too_long_is_bad_input(tmp_path: Path) -> None:
    url = str(tmp_path / ("n" * 256))
    for act in (lambda: storage.write(url, b"x"), lambda: storage.create(url, b"x"), lambda: storage.read(url)):
        with pytest.raises(StorageInputError, match="too long"):
            act()


@pytest.mark.parametrize("endpoint", ["localhost:9000", "minio.local", "//minio:9000", "http://"])
def test_an_endpoint_that_is_no_url_is_bad_input(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        with pytest.raises(StorageInputError) as caught:
            storage.exists("s3://bucket/a")
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
    assert (caught.value.code, caught.value.where) == ("storage.endpoint", "s3://bucket/a")
    assert caught.value.got == endpoint
    assert "AWS_ENDPOINT_URL" in str(caught.value.next_step)


def test_names_that_a_file_system_cannot_hold_are_refused_before_work(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    storage.check_names(str(folder), ["n" * 255])
    storage.check_names("s3://bucket/new", ["n" * 300])
    for name in ("n" * 256, "ü" * 128):
        with pytest.raises(StorageInputError) as caught:
            storage.check_names(str(folder), ["a", name])
        assert (caught.value.code, caught.value.where) == ("storage.name-too-long", str(folder))
        assert str(caught.value.got).startswith("256 bytes")
    assert not folder.exists()


@pytest.mark.parametrize("letter", ["n", "ü", "語"])
def test_a_local_copy_of_an_object_with_a_very_long_name_is_made(letter: str, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/{letter * 400}.tar"
    storage.write(url, b"x")
    assert storage.local_copy(url, tmp_path / "copies").read_bytes() == b"x"
    with NodeStore(tmp_path / "store").acquire_url(url) as held:
        assert held.path.read_bytes() == b"x"
