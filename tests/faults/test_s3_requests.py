"""What S3 is asked, counted in the server's own log: the figures of docs/operations.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from jobs.build_cache import build_cache, check_shards
from pipeline.shards.write import pack_shards
from schemas.config import Config
from tests.jobs.conftest import NETWORK
from tests.pipeline.caches import digit_samples

pytestmark = pytest.mark.slow
Asked = Callable[[], Counter[str]]


@pytest.fixture
def asked(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Requests by kind since it was last called."""
    assert s3
    log = max(tmp_path_factory.getbasetemp().glob("moto*/log"), key=lambda path: path.stat().st_mtime_ns)
    seen = 0

    def count() -> Counter[str]:
        nonlocal seen
        found = re.findall(r'"([A-Z]+) (\S+) HTTP', log.read_text())
        fresh, seen = found[seen:], len(found)
        return Counter("LIST" if method == "GET" and "list-type" in path else method for method, path in fresh)

    count()
    return count


def test_sizes_of_many_shards_take_a_request_a_thousand_names(s3: str, asked: Asked) -> None:
    by_id = {f"s-{number:04d}": f"{s3}/many/s-{number:04d}.tar" for number in range(1_200)}
    fsspec.filesystem("s3", skip_instance_cache=True).pipe({url: shard.encode() for shard, url in by_id.items()})
    asked()
    assert set(check_shards(f"{s3}/no-cache", by_id, []).values()) == {6}
    found = asked()
    # Besides the two pages: is there a manifest?
    assert found["LIST"] <= 3
    assert found["HEAD"] <= 1


def _build(s3: str, shards: list[str]) -> None:
    build_cache(
        Config.model_validate(
            {
                "data": {"shards": shards, "num_classes": 10},
                "teacher": {**NETWORK, "batch_size": 8},
                "views": {"kind": "crop", "count": 4, "size": 16},
                "cache": {"url": f"{s3}/cache-{len(shards)}", "class_means": "eval", "views_per_part": 2},
                "ray": {"address": "none"},
            }
        )
    )


def test_a_shard_of_three_parts_costs_the_requests_that_are_documented(s3: str, asked: Asked) -> None:
    of_build: dict[int, Counter[str]] = {}
    for num_shards in (2, 6):
        shards = pack_shards(digit_samples(12 * num_shards), f"{s3}/in-{num_shards}/d-%03d.tar", shard_size=12)
        asked()
        _build(s3, shards)
        of_build[num_shards] = asked()
    more = {kind: (of_build[6][kind] - of_build[2][kind]) / 4 for kind in ("PUT", "GET", "HEAD", "LIST")}
    text = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    row = re.search(r"^\| a shard of three parts \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert row is not None
    assert [*map(int, row.groups())] == [*more.values()]
