"""Commits: the first one wins, and file names have their shard and block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.cache.build.commit import publish_commit, publish_file
from pipeline.cache.format import layout
from schemas.cache_format import ByteRange, Commit, FileRef, Statistics, ViewBlock
from tests.pipeline.caches import read_commits

EVAL = ViewBlock(start=0, stop=1, is_eval=True)


def commit(block: ViewBlock, **changes: Any) -> Commit:
    fields: dict[str, Any] = {
        "fingerprint": "f",
        "shard_id": "s",
        "shard_size_bytes": 1,
        "block": block,
        "part": FileRef(path="p", sha256="0", size_bytes=0),
        "index": FileRef(path="i", sha256="0", size_bytes=0),
        "means": None,
        "num_ok": 3,
        "read": 5,
        "written": 3,
        "skipped": {"empty": 2},
        "views": (),
        "footer": ByteRange(offset=0, size_bytes=0, digest="0"),
        "statistics": Statistics(),
        "environment": {},
    }
    return Commit.model_validate({**fields, **changes})


def test_rows_that_vanish_are_refused() -> None:
    with pytest.raises(ValueError, match="read 6 != written 3"):
        commit(ViewBlock(start=0, stop=1), read=6)


def published(cache: str, folder: Path, content: bytes, path: str) -> FileRef:
    local = folder / "local"
    local.write_bytes(content)
    return publish_file(cache, local, path)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_the_first_commit_wins_and_the_loser_removes_its_files(tmp_path: Path, scheme: str) -> None:
    cache = f"{tmp_path}/cache" if scheme == "file" else f"memory://{tmp_path.name}/race"
    part, means = layout.part_path("s", EVAL), layout.means_path("s", EVAL)
    commits = [
        commit(EVAL, part=published(cache, tmp_path, content, part), means=published(cache, tmp_path, b"same", means))
        for content in (b"first", b"second")
    ]
    assert [publish_commit(cache, candidate) for candidate in commits] == [commits[0], commits[0]]
    assert commits[0].means is not None
    assert storage.listing(cache) == sorted(["commits/s/eval.json", commits[0].part.path, commits[0].means.path])
    assert storage.read(storage.join(cache, commits[0].part.path)) == b"first"
    assert read_commits(cache) == [commits[0]]


@given(st.from_regex(r"[\w.\- ]{1,12}", fullmatch=True), st.integers(0, 20_000), st.integers(1, 9), st.booleans())
def test_a_file_name_has_its_shard_and_block(shard: str, start: int, count: int, is_eval: bool) -> None:
    block = EVAL if is_eval else ViewBlock(start=start, stop=start + count)
    assert layout.is_commit(layout.commit_path(shard, block))
    for path in (layout.part_path(shard, block), layout.means_path(shard, block)):
        assert layout.owner(path.replace("{sha16}", "0123456789abcdef")) == (shard, block)


@pytest.mark.parametrize("path", ["parts/s/eval.parquet", "parts/s/notes.txt", "parts/eval.0123456789abcdef.parquet"])
def test_a_file_with_any_other_name_has_no_owner(path: str) -> None:
    assert layout.owner(path) is None
