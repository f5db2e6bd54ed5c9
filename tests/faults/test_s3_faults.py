"""S3 that throttles, fails, resets, loses responses, truncates and damages bodies: same cache, same losses."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

from jobs.build_cache import build_cache
from jobs.train_student import train_student
from pipeline import storage
from pipeline.core.errors import StorageInputError, TransientStorageError
from pipeline.storage import failures, s3_store
from schemas.config import Config
from tests.errors import raises
from tests.faults.s3_proxy import FAULTS, FaultPlan, proxy
from tests.pipeline.caches import files

pytestmark = pytest.mark.slow
StartProxy = Callable[[FaultPlan], str]


@pytest.fixture
def start_proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartProxy]:
    """``start_proxy(plan)`` puts a proxy with these faults before the server of ``s3`` until the test ends."""
    # Disables the retries of botocore, which would hide those of storage, and the pauses of storage.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(failures.PAUSE, "multiplier", 0)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "connect_timeout", 2)
    class_of_s3 = fsspec.get_filesystem_class("s3")
    target = urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc
    with pytest.MonkeyPatch.context() as patch:
        proxies = []

        def start(plan: FaultPlan) -> str:
            through = proxy(target, plan)
            patch.setenv("AWS_ENDPOINT_URL", through.__enter__())
            proxies.append(through)
            class_of_s3.clear_instance_cache()
            return s3

        yield start
        for through in proxies:
            through.__exit__(None, None, None)
    class_of_s3.clear_instance_cache()


def losses(s3: str, name: str) -> list[tuple[int, float]]:
    lines = storage.read(f"{s3}/run-{name}/metrics.jsonl").decode().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def test_a_build_and_a_training_with_faults_have_the_results_of_those_without(
    start_proxy: StartProxy, s3: str, s3_config: Callable[[str], Config], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("undisturbed", "disturbed"):
        if name == "disturbed":
            plan = FaultPlan(share=0.4, random=random.Random(11))
            start_proxy(plan)
        build_cache(s3_config(name))
        train_student(s3_config(name))
    injected = plan.injected.copy()
    plan.share = 0
    with capsys.disabled():
        print(f"\ninjected: {dict(injected)}; uploads {dict(plan.checksums)} checksum")
    assert {*injected} == {*FAULTS}
    assert plan.checksums["without"] == 0
    assert files(f"{s3}/disturbed") == files(f"{s3}/undisturbed")
    assert losses(s3, "disturbed") == losses(s3, "undisturbed")


@pytest.mark.parametrize("fault", ["response lost", "damaged upload", "reset"])
def test_a_creation_with_a_failed_request_happens_once_and_succeeds(fault: str, start_proxy: StartProxy) -> None:
    class Once(FaultPlan):
        def fault_for(self, method: str, path: str) -> str | None:
            del path
            if method != "PUT" or self.injected[fault]:
                return None
            self.injected[fault] += 1
            return fault

    plan = Once(share=0, random=random.Random(0))
    bucket = start_proxy(plan)
    url = f"{bucket}/once/{fault.replace(' ', '-')}.json"
    assert storage.create(url, b"first")
    assert plan.injected == {fault: 1}
    assert storage.read(url) == b"first"
    assert not storage.create(url, b"second")


def test_a_large_upload_has_parts_with_checksums_and_a_damaged_part_is_sent_again(
    start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The smallest part of S3; the file has more than two of them.
    monkeypatch.setattr(s3_store, "CHUNK_BYTES", 5 * 2**20)
    (tmp_path / "large").write_bytes(random.Random(3).randbytes(12 * 2**20))

    class FirstPart(FaultPlan):
        def fault_for(self, method: str, path: str) -> str | None:
            del method
            if "partNumber=2" not in path or self.injected["damaged upload"]:
                return None
            self.injected["damaged upload"] += 1
            return "damaged upload"

    plan = FirstPart(share=0, random=random.Random(0))
    bucket = start_proxy(plan)
    storage.put(tmp_path / "large", f"{bucket}/large")
    assert plan.injected == {"damaged upload": 1}
    assert plan.checksums["without"] == 0
    assert plan.checksums["with"] == 6
    assert storage.read(f"{bucket}/large") == (tmp_path / "large").read_bytes()


def test_a_store_that_does_not_recover_fails_after_retries_and_a_missing_bucket_at_once(
    start_proxy: StartProxy,
) -> None:
    class Down(FaultPlan):
        def fault_for(self, method: str, path: str) -> str | None:
            self.injected[f"{method} {path}"] += 1
            return "slow down"

    plan = Down(share=1, random=random.Random(0))
    bucket = start_proxy(plan)
    with pytest.raises(TransientStorageError):
        storage.size(f"{bucket}/a")
    assert 5 <= sum(plan.injected.values()) <= 15
    no_faults = FaultPlan(share=0, random=random.Random(0))
    start_proxy(no_faults)
    with pytest.raises(StorageInputError):
        storage.write("s3://no-such-bucket/a", b"x")


def test_a_store_that_ignores_conditions_is_refused_by_the_probe(start_proxy: StartProxy) -> None:
    bucket = start_proxy(FaultPlan(share=0, random=random.Random(0), honours_conditions=False))
    with raises("storage.create-not-exclusive"):
        storage.probe(f"{bucket}/careless")
    assert storage.listing(f"{bucket}/careless") == []


def test_a_probe_of_a_bucket_leaves_no_object_and_a_missing_bucket_is_refused(s3: str) -> None:
    storage.probe(f"{s3}/probed")
    assert storage.listing(f"{s3}/probed") == []
    assert fsspec.filesystem("s3").find(f"{s3}/probed") == []
    with pytest.raises(StorageInputError):
        storage.probe("s3://no-such-bucket/cache")
