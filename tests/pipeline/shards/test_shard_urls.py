"""Shard ids, brace patterns, and the errors for folders and globs."""

from __future__ import annotations

from pathlib import Path

import pytest
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.core.errors import ShardError
from pipeline.shards.shard_urls import brace_patterns, shard_id, shard_ids, shard_urls
from tests.errors import raises


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("train-00012.tar", "train-00012"),
        ("/data/a.b/train.v1.tar", "train.v1"),
        ("s3://bucket/deep/train-00012.tar", "train-00012"),
        ("https://host/x.tar?sig=a/b.tar", "x"),
    ],
)
def test_the_id_is_the_file_stem(url: str, name: str) -> None:
    assert shard_id(url) == name


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.tar.bz2", "a.zip", "a", ".tar", "x/..tar", ""])
def test_compressed_tars_and_other_files_are_refused(name: str) -> None:
    with raises("shard.name", ShardError):
        shard_id(f"s3://bucket/{name}")


def test_the_error_for_a_repeated_stem_names_both_urls_and_no_credentials() -> None:
    with raises("shard.same-name", ShardError) as caught:
        shard_ids(["s3://key:secret@one/a.tar", "b.tar", "s3://two/a.tar"])
    assert "s3://one/a.tar" in str(caught.value)
    assert "s3://two/a.tar" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_ids_are_in_the_order_of_the_urls() -> None:
    assert shard_ids(["x/b.tar", "y/a.tar"]) == ["b", "a"]


NAMES = st.builds(
    lambda stem, number, width, end: f"{stem}{number:0{width}d}{end}.tar",
    st.sampled_from(["train-", "val-", "", "a1-", "x_", "é"]),
    st.integers(0, 30) | st.integers(90, 110),
    st.integers(1, 5),
    st.sampled_from(["", "-of-9", "b"]),
) | st.sampled_from(["all.tar", "a{0..1}.tar", "a,b.tar", "x٣.tar"])


@given(st.sets(NAMES, max_size=40))
def test_patterns_expand_to_exactly_the_names(names: set[str]) -> None:
    patterns = brace_patterns(names)
    special = {name for name in names if "{" in name}
    assert special <= {*patterns}
    expanded = [name for pattern in patterns if pattern not in special for name in braceexpand(pattern)]
    assert sorted(expanded) == sorted(names - special)


def test_a_run_is_one_pattern_and_a_gap_two() -> None:
    names = [f"train-{number:05d}.tar" for number in range(12)]
    assert brace_patterns(names) == ["train-{00000..00011}.tar"]
    assert brace_patterns([name for name in names if "7" not in name]) == [
        "train-{00000..00006}.tar",
        "train-{00008..00011}.tar",
    ]
    assert brace_patterns(f"{number}.tar" for number in range(13)) == ["{0..12}.tar"]


@pytest.fixture(params=["folder", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder with training and validation shards, and another file."""
    url = str(tmp_path / "data") if request.param == "folder" else f"memory://{tmp_path.name}/data"
    for name in (*(f"train-{number:04d}.tar" for number in range(12)), "val-0000.tar", "classes.json"):
        storage.write(f"{url}/{name}", b"x")
    return url


@pytest.mark.parametrize("end", ["", "/"])
def test_a_folder_is_refused_with_the_patterns_of_its_shards(base: str, end: str) -> None:
    with raises("data.folder", ShardError) as caught:
        shard_urls(base + end)
    assert caught.value.where == "data.shards"
    values = str(caught.value.next_step).split(": ", 1)[1].split(", ")
    assert values == [
        f"data.shards={base}/train-{{0000..0011}}.tar",
        f"data.val_shards={base}/val-0000.tar",
    ]
    assert len(shard_urls(values[0].split("=", 1)[1])) == 12


@pytest.mark.parametrize(
    ("glob", "suggested"),
    [
        ("*.tar", "data.shards={base}/train-{{0000..0011}}.tar, data.val_shards={base}/val-0000.tar"),
        ("train-*.tar", "data.shards={base}/train-{{0000..0011}}.tar"),
        ("train-000[2-4].tar", "data.shards={base}/train-{{0002..0004}}.tar"),
        ("val-????.tar", "data.shards={base}/val-0000.tar"),
        ("other-*.tar", None),
    ],
)
def test_a_glob_is_refused_with_the_pattern_of_what_it_matches(base: str, glob: str, suggested: str | None) -> None:
    if "?" in glob and "://" in base:
        pytest.skip("a question mark begins the query of a URL")
    with raises("data.glob", ShardError) as caught:
        shard_urls([f"{base}/{glob}"])
    expected = "no file matches" if suggested is None else suggested.format(base=base)
    assert expected in str(caught.value.next_step)


def test_another_key_is_named_and_several_patterns_are_a_list(tmp_path: Path) -> None:
    for name in ("a-1.tar", "b.tar"):
        (tmp_path / name).touch()
    with raises("data.folder") as caught:
        shard_urls(str(tmp_path), key="data.val_shards")
    assert str(caught.value.next_step).endswith(f"data.val_shards=['{tmp_path}/a-1.tar', '{tmp_path}/b.tar']")


def test_the_error_for_a_folder_of_images_suggests_packing(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with raises("data.folder", next_step=f"make shards of its images: stillroom shards pack {tmp_path} OUT"):
        shard_urls(str(tmp_path))


def test_files_may_have_any_name_and_absent_ones_are_not_checked(tmp_path: Path) -> None:
    (tmp_path / "odd[1].tar").touch()
    (tmp_path / "x.tar.gz").touch()
    urls = [f"{tmp_path}/odd[1].tar", f"{tmp_path}/x.tar.gz", f"{tmp_path}/absent.tar", f"{tmp_path}/absent"]
    assert shard_urls(urls) == urls
