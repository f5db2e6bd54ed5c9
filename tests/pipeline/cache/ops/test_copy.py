"""A copy has the bytes of its source in any store; an interrupted one continues, and nothing else is overwritten."""

from __future__ import annotations

import uuid
from collections import Counter
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.cache.build.manifest import read_manifest
from pipeline.cache.build.part import build_part
from pipeline.cache.format import layout
from pipeline.cache.format.header import read_header
from pipeline.cache.ops.copy import CopyReport, copy_cache
from pipeline.cache.ops.moments import compute_moments
from pipeline.cache.ops.relabel import relabel
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.core.hashing import digest, seal
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section, files, open_tasks, shard_urls
from tests.pipeline.conftest import TinyConfig


class KilledError(Exception):
    """Ends a copy like the death of its process."""


@pytest.fixture
def target() -> str:
    """A folder in the memory of this process: another store than that of the caches."""
    return f"memory://copies/{uuid.uuid4().hex}"


def kill_at_write(patch: pytest.MonkeyPatch, number: int) -> Counter[str]:
    """From the write with this number on, every write ends the process; returns the counts of writes by URL."""
    written: Counter[str] = Counter()

    def dying(name: str) -> None:
        original = getattr(storage, name)

        def write(*args: object) -> object:
            if written.total() >= number:
                raise KilledError
            url = str(args[-1] if name == "put" else args[0])
            if ".tmp-probe" not in url:
                written[url] += 1
            return original(*args)

        patch.setattr(storage, name, write)

    for name in ("put", "create", "write"):
        dying(name)
    return written


def extended(cache: TinyCache, num_views: int) -> TinyCache:
    views = cache.config.views.model_copy(update={"count": num_views})
    config = cache.config.model_copy(update={"views": views})
    build(config)
    return TinyCache(cache.url, config)


def test_a_copy_in_another_store_has_the_same_bytes_and_is_whole(built_cache: TinyCache, target: str) -> None:
    report = copy_cache(built_cache.url, target, threads=2)
    expected = files(built_cache.url)
    assert files(target) == expected
    assert (report.num_files, report.num_written) == (len(expected), len(expected))
    assert report.bytes_written == report.num_bytes == sum(map(len, expected.values()))
    assert report.left_out == {}
    assert verify_cache(target).ok


def test_moments_and_labels_that_were_read_again_are_copied(tiny_cache: TinyCache, target: str) -> None:
    relabel(tiny_cache.url)
    compute_moments(tiny_cache.url)
    report = copy_cache(tiny_cache.url, target)
    copied, source = files(target), files(tiny_cache.url)
    # The class means are those of the former labels.
    assert source.keys() - copied.keys() == {layout.CLASS_MEANS}
    assert report.left_out == {"files of former states": 1}
    assert any(path.startswith(layout.RELABELLED) for path in copied)
    assert any(path.startswith(layout.MOMENTS) for path in copied)
    assert verify_cache(target).ok


def test_a_file_that_the_header_names_by_its_digest_is_copied(tiny_cache: TinyCache, target: str) -> None:
    header, manifest = read_header(tiny_cache.url), read_manifest(tiny_cache.url)[0]
    teacher = {**header.teacher, "head": digest(b"weights")}
    data = seal(header.model_copy(update={"teacher": teacher}).model_dump(mode="json"))
    changed = manifest.model_copy(update={"header_sha256": digest(data)})
    Path(tiny_cache.url, layout.HEADER).write_bytes(data)
    Path(tiny_cache.url, layout.MANIFEST).write_bytes(seal(changed.model_dump(mode="json")))
    Path(tiny_cache.url, layout.HEAD).write_bytes(b"weights")
    copy_cache(tiny_cache.url, target)
    assert files(target) == files(tiny_cache.url)
    Path(tiny_cache.url, layout.HEAD).write_bytes(b"others")
    with raises("cache.changed-file"):
        copy_cache(tiny_cache.url, f"{target}-2")


def test_what_the_manifest_does_not_describe_is_left_out_and_counted(tiny_cache: TinyCache, target: str) -> None:
    before = files(tiny_cache.url)
    # A part that is newer than the manifest, a log, and a file of a killed writer.
    config = tiny_cache.config.model_copy(update={"views": tiny_cache.config.views.model_copy(update={"count": 5})})
    build_part(open_tasks(config)[0])
    for name in ("log/build-1.json", "parts/.tmp-1f"):
        path = Path(tiny_cache.url, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
    report = copy_cache(tiny_cache.url, target)
    assert files(target) == before
    assert report.left_out == {
        "build logs": 1,
        "commits that are not in the manifest": 1,
        "files that no record of this state names": 1,
        "temporary files": 1,
    }


@pytest.mark.parametrize("number", [0, 1, 6, 12, 17])
def test_an_interrupted_copy_is_no_cache_and_continues_without_writing_twice(
    built_cache: TinyCache, target: str, number: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at_write(patch, number)
        with pytest.raises(KilledError):
            copy_cache(built_cache.url, target)
    assert not storage.exists(storage.join(target, layout.MANIFEST))
    begun = files(target)
    with pytest.MonkeyPatch.context() as patch:
        written = kill_at_write(patch, 10**6)
        report = copy_cache(built_cache.url, target)
    expected = files(built_cache.url)
    assert files(target) == expected
    assert report.num_written == len(expected) - len(begun)
    # Only ``create`` looks at a record that is there.
    assert not [
        path for path in begun if path.startswith(("parts/", "index/", "means/")) and written[f"{target}/{path}"]
    ]


def test_a_second_copy_writes_nothing(built_cache: TinyCache, target: str) -> None:
    first = copy_cache(built_cache.url, target)
    second = copy_cache(built_cache.url, target)
    assert (second.num_files, second.num_written, second.bytes_written) == (first.num_files, 0, 0)


def test_a_copy_follows_its_source_and_runs_with_the_former_manifest_read_on(
    tiny_cache: TinyCache, target: str
) -> None:
    copy_cache(tiny_cache.url, target)
    former = read_manifest(target)[1]
    grown = extended(tiny_cache, 5)
    report = copy_cache(grown.url, target)
    assert 0 < report.num_written < report.num_files
    assert report.left_out.keys() == {"files of former states"}
    assert (read_manifest(target)[0].num_views, verify_cache(target).ok) == (5, True)
    assert open_cache(target, manifest_bytes=former).view("digits-00", 2).row_N.size == 20
    # And not back: the source lacks commits of the copy.
    with raises("cache.other-destination") as caught:
        copy_cache(built_at(tiny_cache, 3), target)
    assert "v0003-0004.json" in str(caught.value.got)


def built_at(cache: TinyCache, num_views: int) -> str:
    """A cache of the same teacher with fewer views."""
    url = f"memory://copies/{uuid.uuid4().hex}"
    section = cache_section(cache.config).model_copy(update={"url": url})
    views = cache.config.views.model_copy(update={"count": num_views})
    build(cache.config.model_copy(update={"cache": section, "views": views}))
    return url


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({"views": {"seed": 3}}, "views.seed: 3 -> 0"),
        ({"cache": {"logits": "fp16"}}, "teacher.logits: fp16 -> fp32"),
        ({"data": {"max_pixels": 10**6}}, "data.max_pixels: 1000000 -> 64000000"),
    ],
)
def test_another_cache_is_refused_with_what_differs_and_stays(
    built_cache: TinyCache, tiny_config: TinyConfig, sections: dict[str, object], changed: str
) -> None:
    other = tiny_config(**{"views": {"count": 1}, **sections})
    build(other)
    url = cache_section(other).url
    before = files(url)
    with raises("cache.other-destination") as caught:
        copy_cache(built_cache.url, url)
    assert changed in str(caught.value.got)
    assert files(url) == before


def test_an_unfinished_or_missing_source_is_refused(tiny_cache: TinyCache, target: str) -> None:
    Path(tiny_cache.url, layout.MANIFEST).unlink()
    with raises("cache.unfinished"):
        copy_cache(tiny_cache.url, target)
    with raises("cache.missing"):
        copy_cache(f"{tiny_cache.url}-no", target)
    assert files(target) == {}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("folder", ["parts", "means", "index", "commits", "class_means.parquet", "manifest"])
def test_a_damaged_source_file_is_not_copied(tiny_cache: TinyCache, target: str, folder: str) -> None:
    root = Path(tiny_cache.url, folder)
    path = root if root.is_file() else sorted(item for item in root.rglob("*") if item.is_file())[0]
    flip(path)
    with raises("cache.record-changed" if folder == "commits" else "cache.changed-file"):
        copy_cache(tiny_cache.url, target)
    assert path.relative_to(tiny_cache.url).as_posix() not in files(target)
    assert not storage.exists(storage.join(target, layout.MANIFEST))


def test_a_damaged_part_of_the_copy_is_written_again_and_a_damaged_index_is_refused(
    built_cache: TinyCache, tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    copy_cache(built_cache.url, str(target))
    flip(next((target / "parts").rglob("*.parquet")))
    assert copy_cache(built_cache.url, str(target)).num_written == 1
    assert verify_cache(str(target)).ok
    flip(next((target / "index").rglob("*.parquet")))
    with raises("cache.other-destination"):
        copy_cache(built_cache.url, str(target))


def test_a_store_that_loses_bytes_is_noticed(
    built_cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = storage.put

    def truncating(local: Path, url: str) -> None:
        short = tmp_path / "short"
        short.write_bytes(local.read_bytes()[:-1])
        put(short, url)

    monkeypatch.setattr(storage, "put", truncating)
    with raises("storage.copy-differs"):
        copy_cache(built_cache.url, str(tmp_path / "copy"))


def test_a_build_continues_a_copy(tiny_cache: TinyCache, tmp_path: Path) -> None:
    copy_cache(tiny_cache.url, str(tmp_path / "copy"))
    section = cache_section(tiny_cache.config).model_copy(update={"url": str(tmp_path / "copy")})
    copied = TinyCache(str(tmp_path / "copy"), tiny_cache.config.model_copy(update={"cache": section}))
    assert open_tasks(copied.config) == []
    grown, expected = extended(copied, 5), extended(tiny_cache, 5)
    assert files(grown.url) == files(expected.url)
    assert shard_urls(grown.config) == shard_urls(expected.config)


def test_the_report_has_its_fields_for_json(built_cache: TinyCache, target: str) -> None:
    report = copy_cache(built_cache.url, target)
    assert CopyReport(**report.as_dict()) == report
