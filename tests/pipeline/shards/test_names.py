from __future__ import annotations

import pytest

from pipeline.core.errors import ShardError
from pipeline.shards.shard_urls import shard_id, shard_ids


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
    with pytest.raises(ShardError, match="not compressed"):
        shard_id(f"s3://bucket/{name}")


def test_a_repeated_stem_names_both_urls_and_no_credentials() -> None:
    with pytest.raises(ShardError) as caught:
        shard_ids(["s3://key:secret@one/a.tar", "b.tar", "s3://two/a.tar"])
    assert "s3://one/a.tar" in str(caught.value)
    assert "s3://two/a.tar" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_ids_keep_the_order_of_the_urls() -> None:
    assert shard_ids(["x/b.tar", "y/a.tar"]) == ["b", "a"]
