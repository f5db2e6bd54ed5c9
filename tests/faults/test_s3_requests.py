"""S3 requests counted in the server's log, against the plan and the figures of docs/how-to/size-a-build.md."""

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
from pipeline.cache.plan.s3_requests import Requests
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.jobs.conftest import NETWORK
from tests.pipeline.caches import digit_samples

pytestmark = pytest.mark.slow
RequestLog = Callable[[], Counter[str]]
# A plan takes the requests of the driver as a constant, and counts those of shards and parts.
MAX_PLAN_ERROR = 10


@pytest.fixture
def new_requests(s3: str, tmp_path_factory: pytest.TempPathFactory) -> RequestLog:
    """Requests by kind since the last call."""
    assert s3
    log = max(tmp_path_factory.getbasetemp().glob("moto*/log"), key=lambda path: path.stat().st_mtime_ns)
    seen = 0

    def count() -> Counter[str]:
        nonlocal seen
        # The server colours the lines of refused requests.
        requests = re.findall(r'"(?:\x1b\[[0-9;]*m)*([A-Z]+) (\S+) HTTP', log.read_text())
        new, seen = requests[seen:], len(requests)
        return Counter("LIST" if method == "GET" and "list-type" in path else method for method, path in new)

    count()
    return count


@pytest.mark.exhaustive
def test_sizes_of_many_shards_take_a_request_a_thousand_names(s3: str, new_requests: RequestLog) -> None:
    by_id = {f"s-{number:04d}": f"{s3}/many/s-{number:04d}.tar" for number in range(1_200)}
    fsspec.filesystem("s3", skip_instance_cache=True).pipe({url: shard.encode() for shard, url in by_id.items()})
    new_requests()
    assert set(check_shards(f"{s3}/no-cache", by_id, []).values()) == {6}
    requests = new_requests()
    # Two pages of names, and a look-up of the manifest.
    assert requests["LIST"] <= 3
    assert requests["HEAD"] <= 1


def _config(s3: str, num_shards: int, **changed: object) -> Config:
    """A config over the first of the packed shards, with a tiny teacher."""
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


def _by_kind(requests: Counter[str]) -> Requests:
    return Requests(
        put=requests["PUT"] + requests["POST"], get=requests["GET"] + requests["HEAD"], list=requests["LIST"]
    )


def _build_as_planned(config: Config, new_requests: RequestLog) -> Counter[str]:
    """The requests of a build, after a comparison with its plan."""
    planned = report(config, measured=False).plan.traffic.build
    new_requests()
    build_cache(config)
    requests = new_requests()
    actual = _by_kind(requests)
    for kind in ("put", "get", "list"):
        assert abs(getattr(actual, kind) - getattr(planned, kind)) <= MAX_PLAN_ERROR, (kind, actual, planned)
    return requests


def _per_shard(of_8_shards: Counter[str], of_12_shards: Counter[str]) -> dict[str, float]:
    return {kind: (of_12_shards[kind] - of_8_shards[kind]) / 4 for kind in ("PUT", "GET", "HEAD", "LIST")}


def test_a_build_and_an_epoch_send_the_planned_requests(
    s3: str, new_requests: RequestLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A build renews its log every 30 seconds, so on a slow machine it sends more requests than a plan counts.
    monkeypatch.setattr("pipeline.cache.build.build_log.RENEW_S", 3600.0)
    pack_shards(digit_samples(12 * 12), f"{s3}/in/d-%03d.tar", shard_size=12)
    of_8_shards, of_12_shards = (_build_as_planned(_config(s3, num), new_requests) for num in (8, 12))
    # The heads of eight shards are read, however many there are.
    text = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "size-a-build.md").read_text()
    row = re.search(r"^\| a shard of three parts \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert row is not None
    assert [*map(int, row.groups())] == [*_per_shard(of_8_shards, of_12_shards).values()]
    for path in ("manifest.json", *(f"commits/d-{number:03d}/v0002-0003.json" for number in range(4, 9))):
        storage.delete(f"{s3}/cache-12/{path}")
    _build_as_planned(_config(s3, 12), new_requests)
    _check_epoch(s3, new_requests, tmp_path)


def _check_epoch(s3: str, new_requests: RequestLog, folder: Path) -> None:
    of_training: list[Counter[str]] = []
    planned: list[int] = []
    for num_shards in (8, 12):
        planned.append(report(_config(s3, num_shards), measured=False).plan.traffic.epoch.get)
        node = {"local_dir": str(folder / str(num_shards))}
        new_requests()
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
        of_training.append(new_requests())
    # The other requests of a training do not depend on its shards.
    per_shard = _per_shard(*of_training)
    assert (per_shard["PUT"], per_shard["GET"], per_shard["LIST"]) == (0, 4, 0)
    # A HEAD by the process that fetches ahead, and one by the reader unless it has the shard open.
    assert 1 <= per_shard["HEAD"] <= 2
    assert (planned[1] - planned[0]) / 4 == 4 + 2


def test_a_large_object_is_sent_and_fetched_in_the_requests_that_a_plan_counts(
    s3: str, new_requests: RequestLog, tmp_path: Path
) -> None:
    for size_bytes in (60 * 2**20, 70 * 2**20):
        local, url = tmp_path / "large", f"{s3}/large-{size_bytes}"
        local.write_bytes(bytes(size_bytes))
        new_requests()
        storage.put(local, url)
        assert _by_kind(new_requests()) == Requests(put=storage.num_puts(size_bytes), get=1)
        storage.download(url, tmp_path / "copy", size_bytes)
        assert _by_kind(new_requests()) == Requests(get=storage.num_gets(size_bytes))
