from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import ShardError
from pipeline.shards.tar import read_samples
from pipeline.shards.writer import pack_shards
from tests.errors import raises
from tests.pipeline.shards.tars import data_config, make_tar

SAMPLES = [(f"digits/{number:02}", {"png": bytes([number]) * 9, "cls": b"%d" % number}) for number in range(7)]


def test_packed_samples_are_read_in_order_from_shards_of_the_given_size(tmp_path: Path) -> None:
    urls = pack_shards(SAMPLES, f"{tmp_path}/out/train-%05d.tar", shard_size=3)
    assert urls == [f"{tmp_path}/out/train-{number:05}.tar" for number in range(3)]
    read = [[(s.key, s.target, s.data) for s in read_samples(Path(u), data_config(), where=u)] for u in urls]
    assert [len(shard) for shard in read] == [3, 3, 1]
    assert [sample for shard in read for sample in shard] == [
        (key, int(members["cls"]), members["png"]) for key, members in SAMPLES
    ]


def test_a_shard_is_the_plain_tar_of_its_members_without_clock_or_owner(tmp_path: Path) -> None:
    (url,) = pack_shards(SAMPLES, f"{tmp_path}/a-%d.tar", shard_size=7)
    members = [(f"{key}.{name}", content[name]) for key, content in SAMPLES for name in ("cls", "png")]
    assert Path(url).read_bytes() == make_tar(members)


def test_no_shard_is_written_without_samples(tmp_path: Path) -> None:
    assert pack_shards([], f"{tmp_path}/x-%d.tar", shard_size=3) == []
    assert not any(tmp_path.iterdir())


def test_a_shard_whose_samples_fail_midway_is_never_published(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield from SAMPLES[:3]
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="the source broke"):
        pack_shards(failing(), f"{tmp_path}/x-%d.tar", shard_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["x-0.tar"]


@pytest.mark.parametrize("key", ["a.b", "", "__meta__/a", "d/.x"])
def test_a_key_that_would_be_read_back_as_another_is_refused(tmp_path: Path, key: str) -> None:
    with raises("shard.member-name", ShardError):
        pack_shards([(key, {"png": b"x"})], f"{tmp_path}/x-%d.tar", shard_size=2)


@pytest.mark.parametrize(
    ("name", "code"),
    [(name, "pattern-without-number") for name in ("x.tar", "x-%s-%s.tar", "x-%z.tar")]
    + [(name, "name") for name in ("x-%d.tar.gz", "x-%d")],
)
def test_a_pattern_that_does_not_number_shards_is_refused(tmp_path: Path, name: str, code: str) -> None:
    with raises(f"shard.{code}", ShardError):
        pack_shards(SAMPLES, f"{tmp_path}/{name}", shard_size=2)
