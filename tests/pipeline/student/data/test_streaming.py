"""Reads from storage: once per node, within a small limit, with damaged copies, and ahead of use."""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import storage
from pipeline.cache.format import layout
from pipeline.cache.format.codec import raw_rows
from pipeline.cache.read.reader import open_cache
from pipeline.models import load_model
from pipeline.student.data import shard_files
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.join import DamagedFileError, join_rows, map_joined, read_proofs, write_joined
from pipeline.student.data.loader import load_batches
from pipeline.student.data.prefetcher import Prefetcher, budget_warnings
from pipeline.student.data.rows import aug_params_of
from pipeline.student.data.sources import CachedSource
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.evaluator import build_evaluator
from schemas.config import DataConfig
from tests.errors import raises
from tests.pipeline.caches import TinyCache, files, read_commits, shard_urls
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.data.test_dataset import STEPS_AN_EPOCH, assert_same, load
from tests.pipeline.student.runs import cached_source, dataset, order_of, rewrite_view, set_cell

BYTES = Counter[tuple[str, int, int]]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[BYTES]:
    """Every read of an object in memory:// as (path, first byte, end), with its number of reads."""
    reads: BYTES = Counter()
    cat_file, get_file, lock = MemoryFileSystem.cat_file, MemoryFileSystem.get_file, threading.Lock()

    def cat(self: Any, path: str, start: int | None = None, end: int | None = None, **keys: Any) -> bytes:
        data = cat_file(self, path, start=start, end=end, **keys)
        with lock:
            reads[path, start or 0, (start or 0) + len(data)] += 1
        return data

    def get(self: Any, path: str, target: str, **keys: Any) -> None:
        get_file(self, path, target, **keys)
        with lock:
            reads[path, 0, Path(target).stat().st_size] += 1

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", cat)
        patch.setattr(MemoryFileSystem, "get_file", get)
        yield reads


@pytest.fixture
def remote(replays: Replay, tmp_path: Path) -> Iterator[Any]:
    """``remote("crop")``: cache and shards in memory://, and a node store for this test."""
    base = f"memory://{tmp_path.name}"

    def copy(kind: str, **keys: Any) -> TinyCache:
        cache = replays(kind)
        for path, data in files(cache.url).items():
            storage.write(f"{base}/{kind}/{path}", data)
        urls = []
        for name, url in shard_urls(cache.config).items():
            urls.append(f"{base}/shards/{name}.tar")
            storage.write(urls[-1], Path(url).read_bytes())
        data = cache.config.data.model_copy(update={"shards": tuple(urls), "local_dir": str(tmp_path / "node"), **keys})
        return TinyCache(f"{base}/{kind}", cache.config.model_copy(update={"data": data}))

    yield copy
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def batches_of(cache: TinyCache, **changes: Any) -> StepDataset:
    return dataset(cached_source(cache), cache.config.views, **changes)


def expected_reads(cache: TinyCache, view: int) -> BYTES:
    """By the commits alone: of each shard the tar, the index, and of one part one view's range and the footer."""
    reads: BYTES = Counter()
    for commit in read_commits(cache.url):
        if commit.block.is_eval or view not in commit.block.views:
            continue
        part = storage.join(cache.url, commit.part.path)
        (stored,) = [stored for stored in commit.views if stored.view == view]
        whole = [f"{cache.url.rpartition('/')[0]}/shards/{commit.shard_id}.tar"]
        whole.append(storage.join(cache.url, layout.index_path(commit.shard_id)))
        ranges = [(part, stored.offset, stored.offset + stored.size_bytes)]
        ranges.append((part, commit.footer.offset, storage.size(part)))
        ranges += [(url, 0, storage.size(url)) for url in whole]
        reads.update((url.removeprefix("memory:/"), start, end) for url, start, end in ranges)
    return reads


@pytest.mark.parametrize("kind", ["crop", "function_matching"])
def test_an_epoch_reads_the_bytes_of_one_view_once(remote: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With concurrent requests: two ranks, each with a thread that fetches ahead."""
    cache = remote(kind)
    ranks = [batches_of(cache, rank=rank, world_size=2) for rank in range(2)]
    for epoch in (0, 4, 4 + NUM_VIEWS):
        steps = range(epoch * STEPS_AN_EPOCH, epoch * STEPS_AN_EPOCH + 4)
        expected = expected_reads(cache, epoch % NUM_VIEWS)
        assert all(rank.source.fetched_bytes(1) for rank in ranks)
        with counted(monkeypatch) as reads, ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda rank, steps=steps: load(rank, steps), ranks))
        if epoch:
            expected = Counter({read: 1 for read in expected if not read[0].endswith(".tar")})
        assert reads == (expected if epoch <= NUM_VIEWS else Counter())


def test_an_epoch_of_several_views_reads_each_shard_once_and_each_view_as_an_epoch_of_one_does(
    remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = remote("crop")
    source = cached_source(cache)
    steps = dataset(source, cache.config.views, {"views_per_image": 2})
    assert source.fetched_bytes(2) > source.fetched_bytes(1)
    with counted(monkeypatch) as reads:
        # Up to the last step of epoch 0, so that nothing of the next one is fetched ahead.
        load(steps, range(steps.order.num_steps))
    first, second = expected_reads(cache, 0), expected_reads(cache, 1)
    assert reads == first + Counter({read: 1 for read in second if not read[0].endswith(".tar")})


def test_batches_from_remote_shards_are_those_from_local_ones(remote: Any, replays: Replay) -> None:
    steps = range(2 * STEPS_AN_EPOCH)
    local = load(dataset(cached_source(replays("function_matching")), replays("function_matching").config.views), steps)
    for num_workers in (0, 2):
        assert_same(load(batches_of(remote("function_matching")), steps, num_workers), local)


@pytest.mark.slow
@pytest.mark.parametrize("limit_bytes", [1, 30_000])
def test_less_room_than_a_step_needs_is_enough(
    remote: Any, replays: Replay, monkeypatch: pytest.MonkeyPatch, limit_bytes: int
) -> None:
    """One file is more than 1 byte, one shard and one view of it about 30,000 bytes."""
    cache, steps = remote("crop", local_bytes=limit_bytes), range(3 * STEPS_AN_EPOCH)
    local = load(dataset(cached_source(replays("crop")), replays("crop").config.views), steps)
    source = cached_source(cache)
    with counted(monkeypatch) as reads:
        assert_same(load(dataset(source, cache.config.views), steps), local)
    assert sum(reads.values()) > 3 * sum(expected_reads(cache, 0).values())
    source.close()
    assert sum(path.stat().st_size for path in source.store.folder.iterdir()) <= limit_bytes


def test_too_little_room_for_a_window_gives_a_warning_with_numbers(remote: Any) -> None:
    cache = remote("crop", local_bytes=1)
    source = cached_source(cache)
    (text,) = budget_warnings(source, order_of(source, cache.config.views), rank=0, world_size=1)
    assert f"about {2 * source.fetched_bytes(1):,} bytes" in text
    assert "data.local_bytes" in text
    roomy = cached_source(remote("crop", local_bytes=10**9))
    assert budget_warnings(roomy, order_of(roomy, cache.config.views), rank=0, world_size=1) == []


def node_files(source: CachedSource, suffix: str) -> list[Path]:
    return sorted(path for path in source.store.folder.iterdir() if path.suffix == suffix)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_view_on_the_node_is_never_used_and_is_written_again(remote: Any, damage: str) -> None:
    cache = remote("crop")
    before = load(batches_of(cache), range(STEPS_AN_EPOCH))
    source = cached_source(cache)
    for path in node_files(source, ".arrow"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes({"flip": data, "cut": data[:-30], "empty": b""}[damage])
        with pytest.raises(DamagedFileError):
            map_joined(path, outputs=())
    assert_same(load(dataset(source, cache.config.views), range(STEPS_AN_EPOCH)), before)


def test_a_disk_that_corrupts_files_is_reported(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cached_source(remote("crop"))
    monkeypatch.setattr("pipeline.student.data.view_files.write_joined", lambda _, path: path.write_bytes(b"zeros"))
    with raises("storage.disk-corrupts"):
        source.rows(0, np.arange(3, dtype=np.int32), 0)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_copy_of_a_shard_is_fetched_again(remote: Any, damage: str) -> None:
    cache = remote("crop")
    before = load(batches_of(cache), range(STEPS_AN_EPOCH))
    source = cached_source(cache)
    for path in node_files(source, ".tar"):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes(255 - byte for byte in data))
    assert_same(load(dataset(source, cache.config.views), range(STEPS_AN_EPOCH)), before)


def test_a_remote_shard_that_changed_stops_training_by_name(remote: Any) -> None:
    cache = remote("crop")
    url = cache.config.data.shards[0]
    storage.write(url, bytes(255 - byte for byte in storage.read(url)))
    with raises("shard.image-changed"):
        load(batches_of(cache), range(STEPS_AN_EPOCH))


def test_mapped_columns_are_those_of_the_cache_and_lie_in_the_file(replays: Replay, tmp_path: Path) -> None:
    cache = replays("everything")
    opened = open_cache(cache.url)
    for shard, view in ((opened.shards[0], 0), (opened.shards[1], 5)):
        expected, path = opened.view(shard.shard_id, view), tmp_path / f"{shard.shard_id}.arrow"
        write_joined(join_rows(expected, opened.index(shard), where="here"), path)
        joined, proofs = map_joined(path, outputs=["logits"]), read_proofs(path)
        fields = {
            "row": expected.row_N,
            "content_hash": expected.content_hash_N,
            "box": expected.box_N4,
            "flip": expected.flip_N,
            "mix_row": expected.mix_row_N,
            "mix_lambda": expected.mix_lambda_N,
            "embedding_norm": expected.embedding_norm_N,
        }
        for name, values in fields.items():
            stored = joined.rows_N[name]
            assert (stored.dtype, stored.flags.writeable) == (values.dtype, False), name
            assert np.array_equal(stored, values), name
        aug_params = aug_params_of(joined.rows_N)
        assert [*aug_params] == [*expected.aug_params]
        assert all(np.array_equal(values, expected.aug_params[name]) for name, values in aug_params.items())
        assert (tuple(proofs.digests), tuple(proofs.means)) == (expected.pixel_digest, expected.pixel_mean)
        assert np.array_equal(joined.encoded["logits"], raw_rows(expected.outputs["logits"].column))
        assert not joined.encoded["logits"].flags.writeable


def test_an_error_of_what_is_fetched_ahead_comes_at_its_step(replay_copy: Replay) -> None:
    """A part of the second epoch is bad: the batches of the first arrive."""
    cache = replay_copy("crop")
    rewrite_view(cache, "digits-01", 1, set_cell("content_hash", 4, 5))
    batches = load_batches(batches_of(cache), range(2 * STEPS_AN_EPOCH), num_workers=0, pin_memory=False)
    assert [next(batches).step for _ in range(STEPS_AN_EPOCH)] == [*range(STEPS_AN_EPOCH)]
    with raises("cache.other-images"):
        list(batches)


def test_what_comes_is_fetched_before_it_is_met_and_across_epochs(remote: Any) -> None:
    cache = remote("crop")
    source = cached_source(cache)
    order = order_of(source, cache.config.views)
    last = STEPS_AN_EPOCH - 1

    def names() -> list[str]:
        return [path.name.partition("-")[2] for path in node_files(source, ".arrow")]

    with Prefetcher(source, order, rank=0, world_size=1, steps=range(last, 4 * STEPS_AN_EPOCH)) as ahead:
        ahead.advance(last)
        expected = {"digits-00-v0001.arrow", "digits-01-v0001.arrow"}
        while not expected <= {*names()}:
            time.sleep(0.01)
            ahead.advance(last)
    assert len(node_files(source, ".tar")) == 2
    # A window is an epoch here.
    assert not any("v0002" in name for name in names())


def test_a_bug_in_fetching_ahead_is_not_swallowed(replays: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_of(replays("crop"))

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(batches.source, "fetch", fail)
    with pytest.raises(ZeroDivisionError):
        load(batches, range(100 * STEPS_AN_EPOCH))


@pytest.mark.parametrize("kind", ["crop", "function_matching"])
def test_each_image_is_decoded_once_a_step_partners_included(
    replays: Replay, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    decoded, original = Counter[bytes](), shard_files.decode
    monkeypatch.setattr(shard_files, "decode", lambda data, **keys: decoded.update([data]) or original(data, **keys))
    batches = batches_of(replays(kind))
    for step in range(STEPS_AN_EPOCH):
        decoded.clear()
        batch = batches[step]
        assert len(decoded) == len(batch.sample_ids)
        assert set(decoded.values()) == {1}


def test_a_dataset_that_is_sent_to_another_process_gives_the_same(replays: Replay) -> None:
    """As loaders that do not fork do; files that are open in this process are not sent."""
    batches = batches_of(replays("function_matching"))
    before = batches[3]
    sent: StepDataset = pickle.loads(pickle.dumps(batches))
    assert_same([sent[3]], [before])
    sent.source.close()


def test_validation_shards_come_through_the_same_store(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = remote("crop").config
    data: DataConfig = config.data
    assert data.shards is not None
    evaluator = build_evaluator(data.shards, data, config.views, DistributedContext(), num_threads=1)
    loaded = load_model(config.teacher, widths={"logits": 10}, size=16, where="teacher")
    with counted(monkeypatch) as reads:
        first, second = (evaluator(loaded.module, loaded.input) for _ in range(2))
    assert first == second
    assert [path.rpartition(".")[2] for path, _, _ in reads.elements()] == ["tar", "tar"]
