"""URLs: the allow-list, absolute paths, home folders, brace patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import storage
from tests.errors import raises


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


REFUSED = {
    "an empty URL": ["", "  "],
    "a zero byte": ["a\0b"],
    "a chained URL": ["filecache::s3://bucket/a", "zip://a.jpg::s3://bucket/a.zip", "a::b"],
    "protocol 'pipe'": ["pipe://cat x"],
    "protocol 'github'": ["github://owner:name@/a"],
    "protocol ' s3'": [" s3://bucket/a"],
    "protocol 'ssh'": ["ssh://host/a"],
    "protocol 'ftp'": ["ftp://host/a"],
    "protocol 'reference'": ["reference://a"],
    "protocol 'local'": ["local://a"],
    "protocol ''": ["://a"],
    "'pipe:' without the two slashes of a URL": ["pipe:cat /etc/passwd"],
    "'python:' without the two slashes of a URL": ["python:os:system"],
    "'s3:' without the two slashes of a URL": ["s3:/bucket/x", "s3:x"],
    "'file:' without the two slashes of a URL": ["file:relative"],
    "'host.name:' without the two slashes of a URL": ["host.name:path"],
    "s3:// without a bucket or host": ["s3://", "s3:///x", "s3://key:secret@/x"],
    "https:// without a bucket or host": ["https:///x"],
}


@pytest.mark.parametrize(("url", "got"), [(url, got) for got, urls in REFUSED.items() for url in urls])
def test_chained_command_and_unknown_urls_are_refused_by_every_call_with_the_reason(
    url: str, got: str, tmp_path: Path
) -> None:
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
        with raises("storage.refused-url", got=got):
            call(url)


@pytest.mark.parametrize("url", ["https://host/a", "http://host/a", "hf://datasets/x"])
def test_read_only_protocols_are_never_written(url: str) -> None:
    for call in (storage.write, storage.create):
        with raises("storage.read-only-protocol"):
            call(url, b"")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "..", "a/.."])
def test_join_refuses_paths_that_lead_out_of_the_folder(path: str) -> None:
    with raises("storage.path-outside-folder"):
        storage.join("s3://bucket/cache", path)
    assert storage.join("s3://bucket/cache", "a..b/..c/d..") == "s3://bucket/cache/a..b/..c/d.."


def test_braces_expand_in_the_order_written() -> None:
    assert storage.expand("s3://b/t-{00..02}.tar") == ["s3://b/t-00.tar", "s3://b/t-01.tar", "s3://b/t-02.tar"]
    assert storage.expand(("b{1,0}.tar", "a.tar")) == ["b1.tar", "b0.tar", "a.tar"]


def test_an_open_brace_and_a_refused_protocol_inside_braces_are_errors() -> None:
    with raises("storage.unclosed-brace"):
        storage.expand("t-{00..02.tar")
    with raises("storage.refused-url"):
        storage.expand("{s3,ssh}://b/t.tar")


def test_the_local_folder_of_a_url_is_the_nearest_that_exists(tmp_path: Path) -> None:
    assert storage.local_folder(f"{tmp_path}/a/b") == tmp_path
    assert storage.local_folder(f"file://{tmp_path}") == tmp_path
    assert storage.local_folder("s3://bucket/a") is None
    assert storage.local_folder("memory://a") is None


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


def test_a_tilde_inside_a_path_or_url_is_not_expanded(home: Path) -> None:
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
        with raises("storage.unknown-home", got="~nobody-of-this-name"):
            call("~nobody-of-this-name/x")
    assert not any(Path.cwd().iterdir())


def test_each_alternative_of_whole_paths_becomes_absolute(home: Path) -> None:
    cwd = Path.cwd()
    assert storage.absolute_patterns("a/{00..99}.tar") == f"{cwd}/a/{{00..99}}.tar"
    assert storage.absolute_patterns("{00..99}.tar") == f"{cwd}/{{00..99}}.tar"
    found = storage.absolute_patterns(("{~/a,/b,c,s3://d}/{0..1}.tar", "e"))
    folders = (f"{home}/a", "/b", f"{cwd}/c", "s3://d")
    assert found == (*(f"{folder}/{number}.tar" for folder in folders for number in (0, 1)), f"{cwd}/e")


@pytest.mark.parametrize("url", ["file://relative/x", "file://localhost/x", "file://~/x"])
def test_a_file_url_names_no_host(url: str) -> None:
    with raises("storage.file-url-with-host"):
        storage.read(url)


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
def test_join_preserves_the_slashes_of_a_protocol(base: str, joined: str) -> None:
    assert storage.join(base, "a", "b") == joined


def test_a_scheme_in_capitals_is_refused_with_the_right_spelling() -> None:
    for url in ("S3://bucket/a", "File:///tmp/a"):
        with raises("storage.scheme-not-lower-case") as caught:
            storage.protocol(url)
        assert url.partition("://")[0].lower() in str(caught.value.next_step)


def test_names_that_a_file_system_cannot_have_are_refused_before_work(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    storage.check_names(str(folder), ["n" * 255])
    storage.check_names("s3://bucket/new", ["n" * 300])
    for name in ("n" * 256, "ü" * 128):
        with raises("storage.name-too-long") as caught:
            storage.check_names(str(folder), ["a", name])
        assert caught.value.where == str(folder)
        assert str(caught.value.got).startswith("256 bytes")
    assert not folder.exists()
