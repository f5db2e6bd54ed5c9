from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import string
import subprocess
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import ShardError
from pipeline.shards.shard_head import read_shard_head
from pipeline.shards.tar import Sample, ShardReader, TarNotes, read_samples, unread_links
from tests.errors import raises
from tests.pipeline.shards.tars import (
    BLOCK,
    data_config,
    image_bytes,
    make_tar,
    real_shard,
    webdataset_samples,
)

LAWS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
END_OF_ARCHIVE = b"\0" * (2 * BLOCK)

PAIR = [("a.jpg", b"A" * 700), ("a.cls", b"3"), ("b.jpg", b"B"), ("b.cls", b"4\n")]


def samples_of(path: Path, content: bytes, **keys: Any) -> list[Sample]:
    path.write_bytes(content)
    return list(read_samples(path, data_config(**keys), where="s3://bucket/x.tar"))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tmp_path / "x.tar"


@pytest.mark.parametrize(
    "name", ["cifar10/train-00003.tar", "cifar10/val-00001.tar", "imagenet-samples/sample-00002.tar"]
)
def test_real_shards_read_as_webdataset_reads_them_also_by_byte_range(name: str) -> None:
    path = real_shard(name)
    samples = list(read_samples(path, data_config(num_classes=1000), where=name))
    expected = [(s["__key__"], int(s["cls"]), s["jpg"]) for s in webdataset_samples(path)]
    assert [(sample.key, sample.target, sample.data) for sample in samples] == expected
    with closing(ShardReader(path, where=name)) as reader, ThreadPoolExecutor(4) as pool:
        ranges = pool.map(lambda sample: reader.read(sample.offset, sample.size), samples)
        assert list(ranges) == [sample.data for sample in samples]


def test_samples_carry_label_status_and_byte_range(shard: Path) -> None:
    first, second = samples_of(shard, make_tar(PAIR))
    assert (first.row, first.key, first.status, first.target, first.data) == (0, "a", "ok", 3, b"A" * 700)
    assert (second.row, second.key, second.status, second.target, second.size) == (1, "b", "ok", 4, 1)
    assert shard.read_bytes()[first.offset : first.offset + first.size] == first.data


ODD_NAMES = ["__meta__/a.jpg", "__x__", "__x__.jpg", "d/__x__/a.jpg", "d/.hidden", "._a.jpg", "a.tar.gz", "a."]
NAMES = st.text(st.sampled_from("ab.B_/é \n"), min_size=1, max_size=9) | st.sampled_from(
    [*ODD_NAMES, "x" * 150 + "/a.jpg"]
)
TARS = st.lists(st.tuples(NAMES, st.binary(max_size=40)), max_size=8)
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


@LAWS
@given(members=TARS, form=FORMATS)
def test_keys_and_images_are_those_of_webdataset_for_any_names(
    shard: Path, members: list[tuple[str, bytes]], form: int
) -> None:
    shard.write_bytes(make_tar(members, form=form))
    try:
        expected = webdataset_samples(shard)
    except ValueError:
        return  # a repeated member: see the tests below
    groups = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in expected]
    if not groups:
        return
    extensions = sorted({extension for _, images in groups for extension in images})
    config = data_config(image=";".join(extensions), label=None)
    samples = list(read_samples(shard, config, where="x"))
    assert [sample.key for sample in samples] == [key for key, _ in groups]
    listed = [name for name in extensions if name.strip() == name and name]
    for sample, (_, images) in zip(samples, groups, strict=True):
        best = next((images[name] for name in listed if name in images), b"")
        assert sample.data == best


@pytest.mark.parametrize("key", ["/".join(["folder" * 20] * 5) + "/kéy", "n" * 100_000], ids=["folders", "longest"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read_whole(shard: Path, form: int, key: str) -> None:
    (sample,) = samples_of(shard, make_tar([(f"{key}.jpg", b"x")], form=form))
    assert sample.key == key


@pytest.mark.parametrize(
    ("members", "statuses"),
    [
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")], ["ok", "ok", "duplicate_key"]),
        ([("a.jpg", b"1"), ("a.JPG", b"2")], ["duplicate_key"]),
        ([("a.jpg", b""), ("a.cls", b"1"), ("b.cls", b"1"), ("c.txt", b"x")], ["empty", "no_image", "no_image"]),
    ],
    ids=["key", "extension in a sample", "no image"],
)
def test_samples_that_cannot_be_used_have_the_status_of_their_kind(
    shard: Path, members: list[tuple[str, bytes]], statuses: list[str]
) -> None:
    assert [sample.status for sample in samples_of(shard, make_tar(members))] == statuses


def test_the_first_listed_image_extension_wins_in_any_order_of_members(shard: Path) -> None:
    content = make_tar([("a.png", b"png"), ("a.jpg", b"jpg"), ("b.jpg", b"jpg"), ("b.png", b"png")])
    assert [s.data for s in samples_of(shard, content, image="png; JPG")] == [b"png", b"png"]


def test_an_image_longer_than_its_pixels_could_be_is_not_read(shard: Path) -> None:
    limit = 8 * 10 + (1 << 20)
    content = make_tar([("a.jpg", b"x" * limit), ("b.jpg", b"x" * (limit + 1))])
    whole, bomb = samples_of(shard, content, max_pixels=10)
    assert (whole.status, bomb.status, bomb.data, bomb.size) == ("ok", "too_large", b"", 0)


def notes_of(path: Path, content: bytes, **keys: Any) -> tuple[list[Sample], list[str]]:
    """The samples, and the lines about omissions."""
    path.write_bytes(content)
    notes = TarNotes()
    samples = list(read_samples(path, data_config(**keys), where="s3://bucket/x.tar", notes=notes))
    return samples, notes.omissions.lines()


def test_members_that_are_not_files_are_omitted_and_counted(shard: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("p.jpg", tarfile.FIFOTYPE), ("c.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
    (sample,), lines = notes_of(shard, buffer.getvalue()[: 3 * BLOCK] + make_tar([("a.jpg", b"x"), ("README", b"x")]))
    assert sample.key == "a"
    assert lines == ["2 devices and pipes (p.jpg, c.jpg)", "1 files without an extension (README)"]


APPLE = b"\0\5\x16\7" + bytes(160)


@pytest.mark.parametrize("folder", ["", "./", "train/", "./a/b.c/"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_hidden_members_split_no_sample_at_any_depth(shard: Path, folder: str, form: int) -> None:
    plain = [(folder + name, content) for name, content in PAIR]
    hidden = [(f"{folder}.DS_Store", b"x"), (f"{folder}.hidden/a.jpg", b"x")]
    mixed = hidden + [
        member
        for name, content in plain
        for member in ((f"{folder}._{name.rpartition('/')[2]}", APPLE), (name, content), (f"__MACOSX/{folder}._x", b""))
    ]
    samples, lines = notes_of(shard, make_tar(mixed, form=form))
    (tmp := shard.with_name("plain.tar")).write_bytes(make_tar(plain, form=form))
    expected = list(read_samples(tmp, data_config(), where="x"))
    assert [(s.row, s.key, s.status, s.target, s.data) for s in samples] == [
        (s.row, s.key, s.status, s.target, s.data) for s in expected
    ]
    assert len(lines) == 1
    assert lines[0].startswith(f"10 hidden members ({folder}.DS_Store, {folder}.hidden/a.jpg, {folder}._a.jpg, …)")


def test_the_error_for_a_tar_of_hidden_members_counts_them(shard: Path) -> None:
    with raises("shard.no-samples", ShardError, got="1 hidden members (d/._a.jpg)"):
        samples_of(shard, make_tar([("d/._a.jpg", APPLE)]))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_read_as_the_files_of_the_extracted_tar(shard: Path, kind: bytes, form: int) -> None:
    long = "n" * 90
    members: list[tuple[str, bytes | str]] = [
        ("./a.jpg", b"A" * 700),
        ("./a.cls", b"3"),
        (f"d/{long}.jpg", b"B"),
        (f"d/{long}.cls", b"4"),
        ("./k.jpg", "./a.jpg" if kind == tarfile.LNKTYPE else "a.jpg"),
        ("./k.cls", "a.cls"),
        ("d/l.jpg", f"d/{long}.jpg" if kind == tarfile.LNKTYPE else f"{long}.jpg"),
        ("d/l.cls", "./k.cls" if kind == tarfile.LNKTYPE else "../k.cls"),
    ]
    samples, lines = notes_of(shard, make_tar(members, form=form, kind=kind))
    assert lines == []
    (shard.parent / "out").mkdir()
    subprocess.run(["tar", "-xf", shard, "-C", shard.parent / "out"], check=True)
    for sample in samples:
        path = shard.parent / "out" / sample.key
        assert sample.data == path.with_name(path.name + ".jpg").read_bytes()
        assert sample.target == int(path.with_name(path.name + ".cls").read_text())
    assert [sample.key for sample in samples] == ["./a", f"d/{long}", "./k", "d/l"]
    # The range of a linked member is that of its target.
    assert (samples[2].offset, samples[2].size) == (samples[0].offset, samples[0].size)
    with closing(ShardReader(shard, where="x")) as reader:
        assert all(reader.read(sample.offset, sample.size) == sample.data for sample in samples)


def test_a_symbolic_link_may_precede_its_target(shard: Path) -> None:
    content = make_tar([("a.jpg", "d/b.jpg"), ("d/b.jpg", b"B")], kind=tarfile.SYMTYPE)
    samples, lines = notes_of(shard, content)
    assert [(sample.key, sample.data) for sample in samples] == [("a", b"B"), ("d/b", b"B")]
    assert lines == []


def test_a_hard_link_is_the_last_file_of_that_name_before_it(shard: Path) -> None:
    content = make_tar([("a.txt", b"old"), ("k.jpg", "a.txt"), ("a.txt", b"new"), ("l.jpg", "a.txt")])
    samples, _ = notes_of(shard, content)
    assert [(sample.key, sample.data) for sample in samples if sample.data] == [("k", b"old"), ("l", b"new")]


def test_links_without_a_file_in_the_tar_are_counted_with_the_reason(shard: Path) -> None:
    members: list[tuple[str, bytes | str | None]] = [
        ("d/", None),
        ("a.jpg", b"A"),
        *((f"gone{row}.jpg", "nothing.jpg") for row in range(5)),
        ("folder.jpg", "d"),
        ("absolute.jpg", "/etc/passwd"),
        ("up.jpg", "../a.jpg"),
        ("deep/up.jpg", "../../a.jpg"),
        ("x.jpg", "y.jpg"),
        ("y.jpg", "x.jpg"),
        ("self.jpg", "self.jpg"),
    ]
    samples, lines = notes_of(shard, make_tar(members, kind=tarfile.SYMTYPE))
    assert [sample.key for sample in samples] == ["a"]
    assert lines == [
        "3 links in a circle (x.jpg, y.jpg, self.jpg)",
        "3 links that lead out of the tar (absolute.jpg, up.jpg, deep/up.jpg)",
        "1 links to folders (folder.jpg)",
        "5 links whose target is not in the tar (gone0.jpg, gone1.jpg, gone2.jpg, …)",
    ]


def test_a_link_to_a_truncated_member_has_no_target(shard: Path) -> None:
    content = make_tar([("a.jpg", "z.bin"), ("b.jpg", b"B"), ("z.bin", b"Z" * 700)], kind=tarfile.SYMTYPE)
    truncated = content[: content.index(b"Z" * 700) + 100]
    samples, lines = notes_of(shard, truncated, bad_samples="skip")
    assert [(sample.key, sample.status) for sample in samples] == [("b", "ok"), ("z", "truncated")]
    assert lines == ["1 links whose target is not in the tar (a.jpg)"]
    with raises("shard.truncated", ShardError):
        samples_of(shard, truncated)


def test_old_rules_read_a_tar_as_the_first_version_did(shard: Path) -> None:
    shard.write_bytes(make_tar([("d/.x", b""), ("d/a.jpg", b"A"), ("d/b.jpg", "d/a.jpg")]))
    notes = TarNotes()
    samples = list(read_samples(shard, data_config(), where="x", rules=1, notes=notes))
    assert [(sample.key, sample.status) for sample in samples] == [("d/", "no_image"), ("d/a", "ok")]
    assert unread_links(notes).counts.total() == 1


def test_the_output_of_gnu_tar_is_read(shard: Path) -> None:
    source = shard.parent / "source"
    source.mkdir()
    for number in range(3):
        (source / f"k{number}.jpg").write_bytes(bytes([number]) * 600)
        (source / f"k{number}.cls").write_text(str(number))
    for extension in ("jpg", "cls"):
        os.link(source / f"k1.{extension}", source / f"k8.{extension}")
        (source / f"k9.{extension}").symlink_to(f"k2.{extension}")
    subprocess.run(["tar", "--sort=name", "-cf", str(shard), "-C", str(source), "."], check=True)
    samples = list(read_samples(shard, data_config(), where="x"))
    assert [(sample.key, sample.target, sample.data[:1]) for sample in samples] == [
        ("./k0", 0, b"\0"),
        ("./k1", 1, b"\1"),
        ("./k2", 2, b"\2"),
        ("./k8", 1, b"\1"),
        ("./k9", 2, b"\2"),
    ]


NOT_TARS: dict[str, tuple[bytes, str, str]] = {
    "gzip": (gzip.compress(make_tar(PAIR), mtime=0), "gzip", "gunzip -c x.tar > unpacked/x.tar"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd", "zstd -dc x.tar"),
    "xz": (lzma.compress(make_tar(PAIR)), "xz", "xz -dc x.tar"),
    "bzip2": (bz2.compress(make_tar(PAIR)), "bzip2", "bunzip2 -c x.tar"),
    "zip": (b"PK\3\4" + bytes(600), "a zip archive", "stillroom shards pack"),
    "HTML": (b"\n <!DOCTYPE HTML>" + b"x" * 600, "HTML", "a server sent this in its place"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "XML", "a server sent this in its place"),
    "JSON": (b'{"error": "Not Found"}', "JSON", "a server sent this in its place"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s1--0.tar\n", "a git-annex pointer", "git annex get"),
    "empty": (b"", "an empty file", "fetch or write this shard again"),
    "image": (image_bytes("JPEG", size=(90, 90)), "JPEG", "stillroom shards pack"),
    "Parquet": (b"PAR1" + bytes(600), "a Parquet file", "write or fetch this shard again"),
    "other": (b"x" * 2000, "unknown bytes", "write or fetch this shard again"),
    "damaged": (b"A" + make_tar(PAIR)[1:], "a tar with a garbled first header", "write or fetch this shard again"),
}


@pytest.mark.parametrize("name", NOT_TARS)
def test_the_error_for_a_file_that_is_no_tar_names_its_kind_and_the_next_step(shard: Path, name: str) -> None:
    content, kind, next_step = NOT_TARS[name]
    shard.write_bytes(content)
    for read in (
        lambda: list(read_samples(shard, data_config(), where=str(shard))),
        lambda: list(read_samples(shard, data_config(bad_samples="skip"), where=str(shard))),
        lambda: read_shard_head(str(shard), data_config(), size_bytes=len(content)),
    ):
        with raises("shard.not-a-tar", ShardError) as caught:
            read()
        assert caught.value.got == kind
        assert next_step in str(caught.value.next_step)


def test_no_label_is_none_and_a_null_label_reads_none(shard: Path) -> None:
    content = make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("b.cls", b"not a number")])
    assert [s.target for s in samples_of(shard, content, label=None)] == [None, None]
    assert [s.target for s in samples_of(shard, content, label="other")] == [None, None]


@pytest.mark.parametrize("text", [b"x", b"10", b"1" * 70], ids=["text", "no class", "too long"])
def test_the_error_for_a_label_that_is_no_class_names_shard_and_key(shard: Path, text: bytes) -> None:
    content = make_tar([("a.jpg", b"1"), ("a.cls", b"9"), ("bad.jpg", b"2"), ("bad.cls", text)])
    with raises("shard.bad-label") as caught:
        samples_of(shard, content, num_classes=10, bad_samples="skip")
    assert "'bad'" in caught.value.what
    assert str(caught.value.where).startswith("s3://bucket/x.tar, ")
    assert str(caught.value.where).endswith(", after 1 samples")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_truncated_anywhere_is_refused_or_has_its_complete_samples_under_skip(shard: Path, form: int) -> None:
    members = [
        ("n" * 120 + "/a.jpg", b"A" * 700),
        ("n" * 120 + "/a.cls", b"3"),
        ("b.jpg", b"B" * BLOCK),
        ("c.jpg", b"C"),
    ]
    content = make_tar(members, form=form)
    whole = samples_of(shard, content)
    # The end of each sample's first header: from there on the tar names the sample.
    header_ends = [content.index(data) for data in (b"A" * 700, b"B" * BLOCK, b"C" + b"\0" * 511)]
    end = len(content.rstrip(b"\0"))
    end += -end % BLOCK + len(END_OF_ARCHIVE)
    assert samples_of(shard, content[:end]) == samples_of(shard, content[:end], bad_samples="skip") == whole
    # The sides of every border of a block, and some places between.
    lengths = sorted({*range(0, end, 61), *(border + side for border in range(0, end, BLOCK) for side in (0, 1, 511))})
    for size_bytes in lengths:
        with pytest.raises(ShardError):
            samples_of(shard, content[:size_bytes])
        if size_bytes < header_ends[0]:
            with pytest.raises(ShardError):
                samples_of(shard, content[:size_bytes], bad_samples="skip")
            continue
        *complete, last = samples_of(shard, content[:size_bytes], bad_samples="skip")
        assert len(complete) == sum(end <= size_bytes for end in header_ends) - 1
        assert complete == whole[: len(complete)]
        assert (last.row, last.key, last.status) == (len(complete), whole[len(complete)].key, "truncated")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (bytes(10240), "no-samples"),
        (bytes(100), "not-a-tar"),
        (make_tar([("__index__/a.json", b"{}"), ("README", b"hello")]), "no-samples"),
    ],
    ids=["zeros", "few zeros", "metadata"],
)
def test_tars_without_samples_are_refused(shard: Path, content: bytes, code: str) -> None:
    with raises(f"shard.{code}", ShardError) as caught:
        samples_of(shard, content)
    assert str(caught.value.where).endswith(", after 0 samples")


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def replaced(content: bytes, start: int, data: bytes) -> bytes:
    return content[:start] + data + content[start + len(data) :]


def one_header(start: int, data: bytes) -> bytes:
    """A tar of one member without bytes, with this data in its header."""
    header = make_tar([("a.jpg", b"")], form=tarfile.GNU_FORMAT)[:BLOCK]
    return with_checksum(replaced(header, start, data)) + END_OF_ARCHIVE


# Headers lie at 0, 1536, 2560 and 3584. The size of a member is at 124 in base 256, here −2048; its kind is at 156.
NEGATIVE_SIZE = with_checksum(replaced(make_tar(PAIR)[1536:2048], 124, b"\xff" * 10 + b"\xf8\0"))
DAMAGED = {
    "a header of text": (replaced(make_tar(PAIR), 1536, b"x" * BLOCK), "damaged"),
    "a later header of text": (replaced(make_tar(PAIR), 2560, b"x" * BLOCK), "damaged"),
    "a header of zeros": (replaced(make_tar(PAIR), 1536, bytes(BLOCK)), "damaged"),
    "a later header of zeros": (replaced(make_tar(PAIR), 2560, bytes(BLOCK)), "damaged"),
    "zeros over several members": (replaced(make_tar(PAIR), 1536, bytes(1536)), "bytes-after-end"),
    "a negative size, at which tarfile would loop": (replaced(make_tar(PAIR), 1536, NEGATIVE_SIZE), "damaged"),
    "a sparse member": (one_header(156, tarfile.GNUTYPE_SPARSE), "sparse"),
    "a name that is not UTF-8": (one_header(0, b"\xff"), "name-not-utf-8"),
}


@pytest.mark.parametrize("bad_samples", ["fail", "skip"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_other_than_truncation_is_refused_also_under_skip(shard: Path, name: str, bad_samples: str) -> None:
    content, code = DAMAGED[name]
    with raises(f"shard.{code}", ShardError):
        samples_of(shard, content, bad_samples=bad_samples)


def test_the_error_for_a_truncated_tar_names_the_byte_and_the_number_of_samples_before(shard: Path) -> None:
    content = make_tar(PAIR)
    # Headers and data: a.jpg 0 and 512 to 1536, a.cls 1536 and 2048, b.jpg 2560 and 3072.
    for size_bytes, position in ((3073, "byte 2560, after 0 samples"), (4100, "byte 3584, after 1 samples")):
        with raises("shard.truncated", where=f"s3://bucket/x.tar, {position}"):
            samples_of(shard, content[:size_bytes])


def test_two_tars_in_one_file_are_refused(shard: Path) -> None:
    with raises("shard.bytes-after-end") as caught:
        samples_of(shard, make_tar(PAIR) + make_tar([("c.jpg", b"C")]))
    assert str(caught.value.where).endswith("byte 10240, after 1 samples")


@LAWS
@given(header=st.sampled_from([0, 1536, 2560, 3584]), place=st.integers(0, BLOCK - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_is_refused_or_changes_nothing(
    shard: Path, header: int, place: int, bit: int
) -> None:
    content = bytearray(make_tar(PAIR))
    whole = samples_of(shard, bytes(content))
    content[header + place] ^= 1 << bit
    try:
        assert samples_of(shard, bytes(content)) == whole
    except ShardError as error:
        where = str(error.where)
    else:
        return
    assert f"byte {header}," in where


@LAWS
@given(data=st.data())
def test_random_damage_never_raises_another_error(shard: Path, data: st.DataObject) -> None:
    content = bytearray(make_tar([("é" * 80 + ".jpg", b"A" * 30), ("b.jpg", b"B"), ("b.cls", b"1")]))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        samples_of(shard, bytes(content))
    except ShardError:
        return


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("before", [[], [("a.jpg", b"1")]])
def test_an_extended_header_that_would_fill_the_memory_is_refused_unread(
    shard: Path, kind: bytes, before: list[tuple[str, bytes]]
) -> None:
    size_bytes = 8 << 30
    header = replaced(make_tar([("x", b"")])[:BLOCK], 124, b"\x80" + size_bytes.to_bytes(11, "big"))
    start = make_tar(before)[: 2 * BLOCK * len(before)]
    with shard.open("wb") as file:
        file.write(start + with_checksum(replaced(header, 156, kind)))
        file.truncate(len(start) + BLOCK + size_bytes + 4 * BLOCK)  # zeros that take no disk space
    for bad_samples in ("fail", "skip"):
        with raises("shard.extended-header-too-large") as caught:
            list(read_samples(shard, data_config(bad_samples=bad_samples), where="x"))
        assert f"byte {len(start)}," in str(caught.value.where)


def test_reading_past_the_end_of_a_shard_is_an_error(shard: Path) -> None:
    shard.write_bytes(b"0123456789")
    with closing(ShardReader(shard, where="s3://bucket/x.tar")) as reader:
        assert reader.read(2, 3) == b"234"
        with raises("shard.too-short", where="s3://bucket/x.tar, byte 8"):
            reader.read(8, 3)


def peak_of_reading(path: Path, num_samples: int) -> int:
    names = (f"{a}{b}{c}" for a in string.ascii_letters for b in string.ascii_letters for c in string.ascii_letters)
    path.write_bytes(make_tar([(f"{name}.jpg", b"x") for name, _ in zip(names, range(num_samples), strict=False)]))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_samples(path, data_config(), where="x")) == num_samples
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_grows_with_the_keys_and_not_with_the_members(shard: Path) -> None:
    few, many = peak_of_reading(shard, 200), peak_of_reading(shard, 4200)
    # A TarInfo is about 1,500 bytes; a short key in a set is under 150.
    assert (many - few) / 4000 < 200
