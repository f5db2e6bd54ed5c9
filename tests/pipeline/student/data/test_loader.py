"""Loader processes: what they need of the machine is checked before the first step."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError, ResourceError
from pipeline.student.data.batch import InputSize
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.loader import batch_bytes, check_loaders
from tests.pipeline.caches import TinyCache
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import cached_source, dataset

_SHM = "/dev/shm"
# Bytes of labels, partners, weights, boxes and norms of one row.
_MAX_SMALL_BYTES_PER_ROW = 64


def _cached(cache: TinyCache, **changes: object) -> StepDataset:
    return dataset(cached_source(cache), cache.config.views, **changes)


@pytest.mark.parametrize("kind", ["crop", "everything"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_bytes_of_a_batch_are_those_of_a_loaded_one(replays: Replay, kind: str, world_size: int) -> None:
    cache = replays(kind)
    batches = _cached(cache, world_size=world_size, teachers=[InputSize(40, "bilinear")])
    batch, sizes = batches[0], []
    batch.map_columns(lambda tensor: sizes.append(tensor.nbytes))
    counted = batch_bytes(batches)
    assert 0 <= sum(sizes) - counted <= _MAX_SMALL_BYTES_PER_ROW * len(batch.sample_ids)


def test_too_many_loaders_for_the_shared_memory_are_refused_with_a_number_that_fits(replays: Replay) -> None:
    batches = _cached(replays("crop"))
    with pytest.raises(ResourceError) as caught:
        check_loaders(batches, num_workers=10**9)
    error = caught.value
    assert (error.code, error.where, error.exit_code) == ("train.shared-memory", _SHM, 2)
    one = batch_bytes(batches)
    assert f"{(2 * 10**9 + 1) * one:,} bytes" in str(error.expected)
    fitting = int(str(error.next_step).partition("train.num_workers=")[2].partition(",")[0])
    found = os.statvfs(_SHM)
    assert abs((2 * fitting + 1) * one - found.f_bavail * found.f_frsize) < found.f_bavail * found.f_frsize / 2
    check_loaders(batches, num_workers=fitting // 2)
    check_loaders(batches, num_workers=0)


def test_a_temporary_folder_that_is_too_long_for_the_loaders_sockets_is_refused(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, long = _cached(replays("crop")), tmp_path / ("x" * 77)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError) as caught:
        check_loaders(batches, num_workers=1)
    assert (caught.value.code, caught.value.where) == ("train.temp-dir-too-long", "TMPDIR")
    check_loaders(batches, num_workers=0)
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 74)
    check_loaders(batches, num_workers=1)
