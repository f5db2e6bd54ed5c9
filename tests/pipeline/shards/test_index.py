from __future__ import annotations

import io
import json
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from pipeline.core.errors import CacheError, ShardError
from pipeline.shards.index import (
    STATUSES,
    ShardIndex,
    check_samples,
    decode_index,
    encode_index,
    index_settings,
    index_shard,
    omissions_of,
)
from pipeline.shards.tar import ShardReader, read_samples
from schemas.cache_format import index_schema
from tests.errors import raises
from tests.pipeline.shards.tars import (
    data_config,
    image_bytes,
    make_tar,
    real_shard,
    webdataset_samples,
)

WHOLE = image_bytes("JPEG", size=(40, 30))
MEMBERS = [
    ("a.jpg", WHOLE),
    ("a.cls", b"1"),
    ("broken.jpg", WHOLE[:-20]),
    ("broken.cls", b"2"),
    ("large.jpg", image_bytes("JPEG", size=(50, 41))),
    ("nothing.jpg", b""),
    ("words.txt", b"hello"),
    ("b.png", image_bytes(size=(3, 9))),
    ("a.jpg", WHOLE),
]
CONFIG = data_config(num_classes=3, max_pixels=2000)
EXPECTED = ["ok", "undecodable", "too_large", "empty", "no_image", "ok", "duplicate_key"]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "x.tar"
    path.write_bytes(make_tar(MEMBERS))
    return path


@pytest.fixture
def index(shard: Path) -> ShardIndex:
    return index_shard(shard, CONFIG, where="s3://bucket/x.tar")


def same(left: ShardIndex, right: ShardIndex) -> bool:
    return encode_index(left, {}) == encode_index(right, {})


def test_every_sample_has_a_row_with_its_final_status(index: ShardIndex) -> None:
    assert [STATUSES[code] for code in index.status] == EXPECTED
    assert index.targets["label"].tolist() == [1, 2, -1, -1, -1, -1, -1]
    assert list(zip(index.width.tolist(), index.height.tolist(), strict=True)) == [
        (40, 30), (0, 0), (0, 0), (0, 0), (0, 0), (3, 9), (0, 0)
    ]  # fmt: skip
    assert index.ok.tolist() == [0, 5]
    assert index.num_ok == 2
    assert index.sample_ids(index.ok) == ["x/a", "x/b"]


def test_byte_ranges_and_hashes_are_those_of_the_encoded_images(shard: Path, index: ShardIndex) -> None:
    images = [WHOLE, WHOLE[:-20], MEMBERS[4][1], b"", b"", MEMBERS[7][1], WHOLE]
    with closing(ShardReader(shard, where="x")) as reader:
        ranges = zip(index.offset.tolist(), index.size.tolist(), strict=True)
        assert [reader.read(offset, size) for offset, size in ranges] == images
    assert index.content_hash.tolist() == [xxhash.xxh3_64(image).intdigest() for image in images]


def test_the_index_of_a_real_shard_agrees_with_webdataset_and_pillow() -> None:
    name = "imagenet-samples/sample-00003.tar"
    path = real_shard(name)
    index = index_shard(path, data_config(num_classes=1000), where=name, threads=2)
    samples = webdataset_samples(path)
    assert index.num_ok == len(index) == len(samples)
    assert index.keys.to_pylist() == [sample["__key__"] for sample in samples]
    assert index.targets["label"].tolist() == [int(sample["cls"]) for sample in samples]
    sizes = [Image.open(io.BytesIO(sample["jpg"])).size for sample in samples]
    assert list(zip(index.width.tolist(), index.height.tolist(), strict=True)) == sizes


@pytest.mark.parametrize("threads", [2, 5])
def test_the_same_tar_gives_the_same_bytes_for_any_number_of_threads(
    shard: Path, index: ShardIndex, threads: int
) -> None:
    again = index_shard(shard, CONFIG, where="file:///elsewhere/x.tar", threads=threads)
    settings = index_settings(CONFIG)
    assert encode_index(again, settings) == encode_index(index, settings)


def test_an_index_survives_its_bytes(index: ShardIndex) -> None:
    back = decode_index(encode_index(index, index_settings(CONFIG)), where="x", settings=index_settings(CONFIG))
    for name in ("row", "status", "offset", "size", "width", "height", "content_hash"):
        column, decoded = getattr(index, name), getattr(back, name)
        assert column.dtype == decoded.dtype
        np.testing.assert_array_equal(column, decoded)
    assert index.targets["label"].dtype == back.targets["label"].dtype == np.int32
    np.testing.assert_array_equal(index.targets["label"], back.targets["label"])
    assert back.keys.equals(index.keys)
    assert back.shard_id == "x"


def test_an_index_is_plain_parquet(index: ShardIndex) -> None:
    table = pq.read_table(io.BytesIO(encode_index(index, {})))
    assert table.schema.equals(index_schema({"label": pa.int32()}))
    assert table["status"].to_pylist() == EXPECTED
    assert table["label"].to_pylist() == [1, 2, None, None, None, None, None]
    assert table["row"].to_pylist() == list(range(7))


@pytest.mark.slow
def test_a_flipped_byte_is_detected_or_changes_no_column(index: ShardIndex) -> None:
    data = encode_index(index, index_settings(CONFIG))
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    num_detected = 0
    for position in range(footer):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        try:
            assert same(decode_index(bytes(damaged), where="x"), index), position
        except CacheError:
            num_detected += 1
    assert num_detected > footer // 2


@pytest.mark.parametrize("size_bytes", [0, 1, 100, -1, -8, -500])
def test_a_truncated_index_is_damaged(index: ShardIndex, size_bytes: int) -> None:
    with raises("shard.index-damaged", CacheError):
        decode_index(encode_index(index, {})[:size_bytes], where="x")


def rewritten(index: ShardIndex, change: dict[str, pa.Array | None]) -> bytes:
    table = pq.read_table(io.BytesIO(encode_index(index, {})))
    for name, column in change.items():
        place, table = table.schema.get_field_index(name), table.drop_columns([name])
        table = table if column is None else table.add_column(place, pa.field(name, column.type, False), column)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"row": pa.array([0, 1, 2, 3, 4, 6, 5], pa.int32())}, "in order"),
        ({"status": pa.array(["ok"] * 6 + ["fine"])}, "unknown status fine"),
        ({"size": pa.array([1] * 7, pa.int64())}, "other types"),
        ({"key": pa.array(["a"] * 7, pa.large_string())}, "other types"),
        ({"label": None}, "not those of an index"),
    ],
)
def test_columns_that_break_the_schema_are_refused(
    index: ShardIndex, change: dict[str, pa.Array | None], reason: str
) -> None:
    with raises("shard.index-damaged", CacheError) as caught:
        decode_index(rewritten(index, change), where="x")
    assert reason in str(caught.value.got)


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("image", "png", "image"),
        ("label", None, "label: cls -> None"),
        ("num_classes", 4, "num_classes: 3 -> 4"),
        ("max_pixels", 9, "max_pixels: 2000 -> 9"),
    ],
)
def test_an_index_of_other_settings_is_refused_with_the_difference(
    index: ShardIndex, key: str, value: Any, difference: str
) -> None:
    data = encode_index(index, index_settings(CONFIG))
    settings = index_settings(CONFIG.model_copy(update={key: value}))
    with raises("shard.index-settings", CacheError) as caught:
        decode_index(data, where="x", settings=settings)
    assert difference in str(caught.value.got)


def test_settings_without_influence_on_the_content_do_not_change_the_index() -> None:
    assert index_settings(CONFIG) == index_settings(
        CONFIG.model_copy(update={"bad_samples": "skip", "shards": "x.tar"})
    )


def test_bad_samples_fail_with_counts_reasons_and_first_keys(index: ShardIndex) -> None:
    with raises("shard.bad-samples", ShardError) as caught:
        check_samples(index, CONFIG, where="s3://bucket/x.tar")
    assert caught.value.what.startswith("5 of 7 samples")
    assert caught.value.where == "s3://bucket/x.tar"
    got = str(caught.value.got)
    assert "1 duplicate_key, 1 empty, 1 no_image, 1 too_large, 1 undecodable" in got
    assert "first broken (undecodable: " in got
    assert "large (too_large: 50×41 pixels are more than 2000)" in got


def test_bad_samples_up_to_max_bad_share_pass_under_skip(index: ShardIndex) -> None:
    """Five of seven are bad."""
    check_samples(index, CONFIG.model_copy(update={"bad_samples": "skip", "max_bad_share": 5 / 7}), where="x")
    with raises("shard.bad-samples", ShardError) as caught:
        check_samples(index, CONFIG.model_copy(update={"bad_samples": "skip", "max_bad_share": 0.71}), where="x")
    assert caught.value.what.startswith("5 of 7 samples")
    assert "0.71" in str(caught.value.expected)
    assert "max_bad_share" in str(caught.value.next_step)


def test_the_first_bad_images_of_a_stored_index_are_read_again_for_their_reasons(
    shard: Path, index: ShardIndex
) -> None:
    stored = decode_index(encode_index(index, {}), where="x")
    assert not stored.reasons
    with raises("shard.bad-samples") as caught:
        check_samples(stored, CONFIG, where=str(shard))
    assert index.reasons[1] in str(caught.value.got)
    assert "50×41 pixels are more than 2000" in str(caught.value.got)
    shard.unlink()
    with raises("shard.bad-samples") as caught:
        check_samples(stored, CONFIG, where=str(shard))
    assert "the shard cannot be read" in str(caught.value.got)


def test_an_index_has_reasons_only_for_the_first_bad_samples(shard: Path) -> None:
    shard.write_bytes(make_tar([(f"{row:02}.jpg", b"x") for row in range(50)]))
    index = index_shard(shard, CONFIG, where="x.tar")
    assert sorted(index.reasons) == list(range(20))
    assert omissions_of(index).lines() == [
        "50 undecodable samples (x/00: not a JPEG, PNG or WebP image, but unknown bytes, "
        "x/01: not a JPEG, PNG or WebP image, but unknown bytes, "
        "x/02: not a JPEG, PNG or WebP image, but unknown bytes, …)"
    ]


def test_the_error_for_separated_members_of_a_sample_has_a_command_that_joins_them(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    shard.write_bytes(make_tar([("a.jpg", WHOLE), ("b.jpg", WHOLE), ("a.cls", b"1"), ("b.cls", b"2")]))
    with raises("shard.bad-samples") as caught:
        check_samples(index_shard(shard, CONFIG, where="x.tar"), CONFIG, where="x.tar")
    _, _, command = str(caught.value.next_step).partition(": ")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    index = index_shard(tmp_path / "sorted" / "x.tar", CONFIG, where="x.tar")
    assert (index.num_ok, index.keys.to_pylist(), index.targets["label"].tolist()) == (2, ["a", "b"], [1, 2])


HIDDEN_OR_LINKED = {
    "hidden in a folder": [("d/.DS_Store", b"x"), ("d/a.jpg", WHOLE)],
    "in a hidden folder": [(".cache/b.jpg", WHOLE), ("d/a.jpg", WHOLE)],
    "hard link": [("d/a.jpg", WHOLE), ("d/b.jpg", "d/a.jpg")],
}


@pytest.mark.parametrize("name", HIDDEN_OR_LINKED)
def test_an_index_stores_its_member_rules_only_if_they_matter(shard: Path, name: str) -> None:
    shard.write_bytes(make_tar(HIDDEN_OR_LINKED[name]))
    old, new = (index_shard(shard, CONFIG, where="x.tar", rules=rules) for rules in (1, 2))
    assert (old.member_rules, new.member_rules) == (1, 2)
    assert len(old) != len(new)
    for index in (old, new):
        back = decode_index(encode_index(index, {}), where="x")
        assert back.member_rules == index.member_rules
        samples = read_samples(shard, CONFIG, where="x.tar", rules=back.member_rules)
        assert [sample.key for sample in samples] == back.keys.to_pylist()


def test_rules_do_not_change_the_bytes_of_other_indexes(shard: Path) -> None:
    shard.write_bytes(make_tar([("._a.jpg", b"x"), ("README", b"x"), ("a.jpg", WHOLE), ("d/", b"")]))
    old, new = (index_shard(shard, CONFIG, where="x.tar", rules=rules) for rules in (1, 2))
    assert encode_index(old, {}) == encode_index(new, {})
    metadata = pq.read_schema(io.BytesIO(encode_index(new, {}))).metadata[b"stillroom"]
    assert json.loads(metadata) == {"format_version": 1, "settings": {}, "shard_id": "x"}


def test_an_index_of_unknown_rules_is_refused(index: ShardIndex) -> None:
    data = encode_index(replace(index, member_rules=3), {})  # pyright: ignore[reportArgumentType]
    with raises("shard.index-damaged", CacheError) as caught:
        decode_index(data, where="x")
    assert "member_rules are 3" in str(caught.value.got)


@pytest.mark.parametrize("bad_samples", ["fail", "skip"])
def test_intact_samples_pass_under_fail_and_with_a_max_bad_share_of_zero(shard: Path, bad_samples: str) -> None:
    shard.write_bytes(make_tar([("a.jpg", WHOLE), ("b.jpg", WHOLE)]))
    config = CONFIG.model_copy(update={"bad_samples": bad_samples, "max_bad_share": 0.0})
    check_samples(index_shard(shard, config, where="x.tar"), config, where="x.tar")


def test_a_truncated_shard_is_indexed_up_to_its_end_under_skip(shard: Path) -> None:
    content = make_tar([("a.jpg", WHOLE), ("a.cls", b"1"), ("b.jpg", WHOLE), ("c.jpg", WHOLE)])
    shard.write_bytes(content[: content.rindex(WHOLE) + 100])
    config = CONFIG.model_copy(update={"bad_samples": "skip"})
    index = index_shard(shard, config, where="x.tar")
    assert [STATUSES[code] for code in index.status] == ["ok", "ok", "truncated"]
    assert index.keys.to_pylist() == ["a", "b", "c"]
    assert (index.offset[2], index.size[2]) == (0, 0)
    back = decode_index(encode_index(index, index_settings(config)), where="x", settings=index_settings(config))
    assert same(back, index)
    with raises("shard.bad-samples", got="1 truncated; first c (truncated)"):
        check_samples(index, CONFIG, where="x.tar")
