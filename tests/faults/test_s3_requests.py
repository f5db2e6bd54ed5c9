"""What S3 is asked, counted in the server's own log: the figures of docs/operations.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from jobs.build_cache import build_cache, check_shards
from jobs.plan_cache import report
from jobs.train_student import train_student
from pipeline import storage
from pipeline.cache.plan.build_plan import Requests
from pipeline.shards.writer import pack_shards
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
        # The server paints what it refuses.
        found = re.findall(r'"(?:\x1b\[[0-9;]*m)*([A-Z]+) (\S+) HTTP', log.read_text())
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


def _config(s3: str, num_shards: int, **changed: object) -> Config:
    """Of shards that are there already; their teacher is a tiny one."""
    return Config.model_validate(
        {
            "data": {"shards": f"{s3}/in/d-{{000..{num_shards - 1:03d}}}.tar", "num_classes": 10},
            "teacher": {**NETWORK, "weights": "random", "batch_size": 8},
            "views": {"kind": "crop", "count": 4, "size": 16},
            "cache": {"url": f"{s3}/cache-{num_shards}", "class_means": "eval", "views_per_part": 2},
            "ray": {"address": "none"},
            **changed,
        }
    )


def _as_planned(asked: Counter[str]) -> Requests:
    return Requests(put=asked["PUT"] + asked["POST"], get=asked["GET"] + asked["HEAD"], list=asked["LIST"])


def test_a_build_asks_what_its_plan_says(s3: str, asked: Asked, tmp_path: Path) -> None:
    pack_shards(digit_samples(12 * 12), f"{s3}/in/d-%03d.tar", shard_size=12)
    of_build: dict[int, Counter[str]] = {}
    for num_shards in (8, 12):
        config = _config(s3, num_shards)
        planned = report(config, measured=False).plan.traffic.build
        asked()
        build_cache(config)
        of_build[num_shards] = asked()
        assert _as_planned(of_build[num_shards]) == planned
    # What more shards ask is in the document; eight are looked at in advance, however many there are.
    more = {kind: (of_build[12][kind] - of_build[8][kind]) / 4 for kind in ("PUT", "GET", "HEAD", "LIST")}
    text = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    row = re.search(r"^\| a shard of three parts \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert row is not None
    assert [*map(int, row.groups())] == [*more.values()]
    _a_build_that_resumes_asks_what_its_plan_says(s3, asked)
    _an_epoch_asks_what_its_plan_says(s3, asked, tmp_path)


def _a_build_that_resumes_asks_what_its_plan_says(s3: str, asked: Asked) -> None:
    config = _config(s3, 12)
    for path in ("manifest.json", *(f"commits/d-{number:03d}/v0002-0003.json" for number in range(4, 9))):
        storage.delete(f"{s3}/cache-12/{path}")
    planned = report(config, measured=False).plan.traffic.build
    asked()
    build_cache(config)
    assert _as_planned(asked()) == planned


def _an_epoch_asks_what_its_plan_says(s3: str, asked: Asked, folder: Path) -> None:
    of_training: dict[int, Counter[str]] = {}
    of_epoch: dict[int, int] = {}
    for num_shards in (8, 12):
        config = _config(s3, num_shards)
        of_epoch[num_shards] = report(config, measured=False).plan.traffic.epoch.get
        node = {"local_dir": str(folder / str(num_shards))}
        asked()
        train_student(
            _config(
                s3,
                num_shards,
                data={"cache": f"{s3}/cache-{num_shards}", "num_classes": 10, **node},
                student={**NETWORK, "size": 16},
                teacher={"mode": "cache"},
                loss=[{"name": "kd"}],
                train={"epochs": 1, "global_batch_size": 8, "lr": 0.1},
                run={"url": f"{s3}/run-{num_shards}"},
            )
        )
        of_training[num_shards] = asked()
    # Beside its shards a training asks the same.
    more = {kind: (of_training[12][kind] - of_training[8][kind]) / 4 for kind in ("PUT", "GET", "HEAD", "LIST")}
    assert (more["PUT"], more["GET"], more["LIST"]) == (0, 4, 0)
    # One look by who fetches ahead, and one by who reads, unless it has the shard open from before.
    assert 1 <= more["HEAD"] <= 2
    assert (of_epoch[12] - of_epoch[8]) / 4 == 4 + 2


def test_a_large_object_is_sent_and_fetched_in_the_requests_that_a_plan_counts(
    s3: str, asked: Asked, tmp_path: Path
) -> None:
    for size_bytes in (60 * 2**20, 70 * 2**20):
        local, url = tmp_path / "large", f"{s3}/large-{size_bytes}"
        local.write_bytes(bytes(size_bytes))
        asked()
        storage.put(local, url)
        assert _as_planned(asked()) == Requests(put=storage.num_puts(size_bytes), get=1)
        storage.download(url, tmp_path / "copy", size_bytes)
        assert _as_planned(asked()) == Requests(get=storage.num_gets(size_bytes))
