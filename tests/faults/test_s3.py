"""S3 by its real protocol, against a server on loopback: conditional create, and build and training in one bucket."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from jobs.build_cache import build_cache
from jobs.train_student import train_student
from pipeline import storage
from schemas.config import Config
from tests.errors import raises

pytestmark = pytest.mark.slow


def test_of_many_creators_exactly_one_wins(s3: str) -> None:
    url = f"{s3}/raced.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: storage.create(url, str(number).encode()), range(16)))
    assert sum(won) == 1
    assert storage.read(url) == str(won.index(True)).encode()


def test_put_read_range_list_and_delete(s3: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    storage.put(tmp_path / "file", f"{s3}/folder/file")
    assert storage.read_range(f"{s3}/folder/file", 2, 3) == b"234"
    assert storage.listing(f"{s3}/folder") == ["file"]
    storage.delete(f"{s3}/folder/file")
    assert storage.listing(f"{s3}/folder") == []
    with raises("storage.missing-file"):
        storage.read(f"{s3}/folder/file")


def test_another_process_s_object_is_visible_and_a_folder_or_a_lack_of_credentials_is_an_error(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3}/seen/a"
    storage.write(f"{s3}/seen/b", b"x")
    assert not storage.exists(url)
    assert storage.listing(f"{s3}/seen") == ["b"]
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(url, b"x")
    assert storage.exists(url)
    for call in (storage.read, storage.size):
        with raises("storage.is-folder"):
            call(f"{s3}/seen")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for call in (storage.exists, storage.read, storage.listing):
        with raises("storage.no-credentials"):
            call(url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_shards_cache_and_run_in_a_bucket_contain_no_secret(s3: str, s3_config: Callable[[str], Config]) -> None:
    config = s3_config("cache")
    manifest = build_cache(config)
    assert (manifest.num_ok, manifest.num_views, manifest.base) == (48, 4, f"{s3}/shards")
    assert train_student(config)["steps"] == 4
    written = {name: storage.read(f"{s3}/{name}") for name in storage.listing(s3)}
    assert "run-cache/metrics.jsonl" in written
    assert not [name for name, data in written.items() if os.environ["AWS_SECRET_ACCESS_KEY"].encode() in data]
