"""Training on the views that a cache stores: the pixels of online training and of the teacher, without any shard."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from PIL import Image
from torch import Tensor

from pipeline import storage
from pipeline.augment import stored_pixels
from pipeline.augment.pixels import pixel_digest
from pipeline.cache.build.context import current_context
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.cache.verify import recompute, verify_cache
from pipeline.cache.verify.report import Findings
from pipeline.shards.writer import pack_shards
from pipeline.student.cached_dataset import CachedDataset
from pipeline.student.supervision.canaries import check_canaries
from pipeline.student.training.config_checks import check_distillation, check_training
from pipeline.teacher.inference import load_teacher
from pipeline.teacher.rendering import Mixing
from schemas.cache_format import BOX_SIDES
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.cache.verify.forge import replace_commit, republish
from tests.pipeline.caches import (
    TinyCache,
    build,
    cache_section,
    copy_of,
    digit_samples,
    files,
    read_commits,
    shard_urls,
)
from tests.pipeline.conftest import tiny_config_of
from tests.pipeline.student.data.test_dataset import assert_same, load
from tests.pipeline.student.runs import (
    NORMALISED,
    cached_source,
    dataset,
    indexed_source,
    losses,
    rewrite_view,
    run,
    run_config,
    set_cell,
    training_error,
)
from tests.waiting import wait_until

KINDS = ["jpeg:90", "raw"]
NUM_ROWS, STEPS_AN_EPOCH, NUM_VIEWS = 32, 4, 3
BAD_ROWS = (2, 3, 25)
VIEWS: dict[str, Any] = {
    "kind": "function_matching",
    "count": NUM_VIEWS,
    "size": 16,
    "mix_group": 8,
    "area": [0.3, 1.0],
    "jitter": {"probability": 0.8},
    "erasing": {"probability": 0.5},
    "cutmix": 0.5,
}


def _pack(folder: Path) -> list[str]:
    """Two shards of 20 and 15 samples, with images that do not decode in the first group of each."""
    samples = [
        (key, members if row not in BAD_ROWS else {**members, "png": b"no image"})
        for row, (key, members) in enumerate(digit_samples(NUM_ROWS + len(BAD_ROWS)))
    ]
    return pack_shards(samples, f"{folder}/digits-%02d.tar", shard_size=20)


def _config(shards: list[str], url: Path, **sections: Any) -> Config:
    return tiny_config_of(shards, str(url), {"data": {"bad_samples": "skip"}, **sections})


Stored = Callable[[str], TinyCache]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """``stored("raw")``: a cache of 32 rows in three mixed views, never written to; its shards are in ``shards/``."""
    built: dict[str, TinyCache] = {}

    def get(pixels: str) -> TinyCache:
        if pixels not in built:
            folder = tmp_path_factory.mktemp("stored")
            (folder / "shards").mkdir()
            config = _config(_pack(folder / "shards"), folder / "cache", views={**VIEWS, "pixels": pixels})
            build(config)
            built[pixels] = TinyCache(str(folder / "cache"), config)
        return built[pixels]

    return get


@pytest.fixture
def alone(stored: Stored, tmp_path: Path) -> Stored:
    """Copies of the caches whose shards do not exist, with a node store for this test."""

    def get(pixels: str) -> TinyCache:
        cache = copy_of(stored(pixels), tmp_path / pixels)
        data = cache.config.data.model_copy(
            update={"shards": (str(tmp_path / "gone" / "digits-{00..01}.tar"),), "local_dir": str(tmp_path / "node")}
        )
        return TinyCache(cache.url, cache.config.model_copy(update={"data": data}))

    return get


def batches(cache: TinyCache, *others: TinyCache) -> list[Any]:
    return load(dataset(cached_source(cache, *others), cache.config.views), range(NUM_VIEWS * STEPS_AN_EPOCH))


@pytest.mark.parametrize("pixels", KINDS)
def test_parity_stored_views_are_those_of_online_training_without_any_shard(
    stored: Stored, alone: Stored, tmp_path: Path, pixels: str
) -> None:
    """Bitwise, with every option, mixing, and images that do not decode."""
    online = load(
        dataset(indexed_source(stored(pixels).config, tmp_path / "index"), stored(pixels).config.views),
        range(NUM_VIEWS * STEPS_AN_EPOCH),
    )
    assert_same([replace(batch, teacher_outputs=()) for batch in batches(alone(pixels))], online)
    assert sum(batch.num_rows for batch in online) == NUM_VIEWS * NUM_ROWS


def test_jpeg_changes_the_pixels_and_raw_does_not(stored: Stored, tmp_path: Path) -> None:
    pixels = {kind: torch.cat([batch.pixels_BCHW for batch in batches(stored(kind))]).int() for kind in KINDS}
    plain = stored("raw").config
    config = plain.model_copy(update={"views": plain.views.model_copy(update={"pixels": "none"})})
    rendered = load(dataset(indexed_source(config, tmp_path), config.views), range(NUM_VIEWS * STEPS_AN_EPOCH))
    expected = torch.cat([batch.pixels_BCHW for batch in rendered]).int()
    assert torch.equal(pixels["raw"], expected)
    # A quality of 90, of small images with hard edges.
    assert 1 < (pixels["jpeg:90"] - expected).abs().float().mean() < 16


def stored_rows(cache: TeacherCache, shard: str, view: int) -> tuple[list[bytes], Any]:
    """The bytes of each view, by offsets and sizes, and the columns."""
    file = io.BytesIO()
    columns = cache.view(shard, view, pixels=file)
    assert columns.pixels is not None
    data, (offset_N, size_N) = file.getvalue(), (columns.pixels.offset_N, columns.pixels.size_N)
    return [data[first : first + size] for first, size in zip(offset_N.tolist(), size_N.tolist(), strict=True)], columns


def decoded(data: bytes, pixels: str) -> Tensor:
    """uint8 [3,16,16], by Pillow."""
    if pixels == "raw":
        return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(16, 16, 3).copy()).permute(2, 0, 1)
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)


@pytest.mark.parametrize("pixels", KINDS)
def test_the_teacher_saw_the_decoded_stored_views(stored: Stored, pixels: str) -> None:
    """Its outputs for the stored views, mixed by the stored columns, are the stored outputs; hashes and digests are
    those of the bytes and of their pixels."""
    built = stored(pixels)
    cache, teacher = (
        open_cache(built.url),
        load_teacher(built.config.teacher, widths={"logits": 10}, size=16, device=torch.device("cpu")),
    )
    num_canaries = 0
    for shard in cache.shards:
        for view in range(NUM_VIEWS):
            data, columns = stored_rows(cache, shard.shard_id, view)
            assert [*map(xxhash.xxh3_64_intdigest, data)] == columns.pixels.hash_N.tolist()
            views_NCHW = torch.stack([decoded(row, pixels) for row in data])
            for digest, view_CHW in zip(columns.pixel_digest, views_NCHW, strict=True):
                num_canaries += digest is not None
                assert digest in (None, pixel_digest(view_CHW))
            # Groups of 8 rows, which are a batch.
            for first in range(0, len(data), 8):
                rows = slice(first, first + 8)
                partner_N = np.searchsorted(columns.row_N, columns.mix_row_N[rows]) - first
                box_N4 = np.stack([columns.aug_params[f"cut_{side}"][rows] for side in BOX_SIDES], 1)
                mixing = Mixing(partner_N.astype(np.int32), columns.mix_lambda_N[rows].copy(), box_N4)
                expected = teacher.infer(views_NCHW[rows], mixing)["logits"]
                np.testing.assert_allclose(columns.logits_NK[rows], expected, rtol=1e-5, atol=1e-5)
    assert num_canaries >= NUM_VIEWS * 2


@pytest.mark.parametrize("pixels", KINDS)
def test_a_run_without_shards_has_the_losses_of_an_online_run(
    stored: Stored, alone: Stored, tmp_path: Path, pixels: str
) -> None:
    keys: dict[str, Any] = {"student": NORMALISED, "train": {"epochs": 3, "num_workers": 0}}
    run(run_config(alone(pixels).config, tmp_path / "cache", **keys))
    config = run_config(stored(pixels).config, tmp_path / "online", mode="online", **keys)
    run(config)
    assert len(losses(tmp_path / "cache")) == 3 * STEPS_AN_EPOCH
    cached, online = losses(tmp_path / "cache"), losses(tmp_path / "online")
    assert cached == pytest.approx(online, rel=training_error(config, 3 * STEPS_AN_EPOCH))


def test_a_dataset_needs_no_shards(alone: Stored) -> None:
    cache = alone("jpeg:90")
    items = [*CachedDataset(cache.url, global_batch_size=8, tail="short")]
    assert sum(len(item) for item in items) == NUM_ROWS
    for item, expected in zip(items, batches(cache), strict=False):
        assert item.rows.sample_ids == expected.sample_ids
        assert torch.equal(item.rows.pixels_BCHW, expected.pixels_BCHW)


def node_files(cache: TinyCache) -> list[Path]:
    """The files of the node's store, without its lock."""
    folders = Path(cache.config.data.local_dir or "").glob("stillroom-*")
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix == ".arrow")


@pytest.mark.parametrize("pixels", KINDS)
def test_a_damaged_copy_of_a_stored_view_is_fetched_again(alone: Stored, pixels: str) -> None:
    cache = alone(pixels)
    expected = batches(cache)
    for path in node_files(cache):
        data = bytearray(path.read_bytes())
        data[0] ^= 1  # of the first stored view
        path.write_bytes(data)
    damaged = [path.read_bytes() for path in node_files(cache)]
    assert_same(batches(cache), expected)
    assert len(damaged) == 2 * NUM_VIEWS
    assert all(path.read_bytes() != data for path, data in zip(node_files(cache), damaged, strict=True))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(("column", "change"), [("pixels", flipped), ("pixel_hash", lambda old: old ^ 1)])
def test_a_stored_view_with_another_hash_stops_training_and_is_a_problem(
    alone: Stored, column: str, change: Callable[[Any], Any]
) -> None:
    """Also where all digests of the cache were written again."""
    cache = alone("jpeg:90")
    rewrite_view(cache, "digits-01", 1, set_cell(column, 4, change))
    source = cached_source(cache)
    row = source.rows(1, np.array([4], np.int32), 1)
    with raises("cache.pixels-changed", where=f"{row.sample_ids[0]}, view 1"):
        source.stored_view(1, 1, row.pixel_ranges[0], sample_id=row.sample_ids[0])
    with raises("cache.pixels-changed"):
        batches(cache)
    report = verify_cache(cache.url, threads=1)
    assert [(problem.shard, problem.view, problem.rows) for problem in report.problems] == [("digits-01", 1, 1)]
    assert report.checked["stored views"] == NUM_VIEWS * NUM_ROWS


def test_verify_compares_the_pixels_of_a_canary_with_its_digest(alone: Stored) -> None:
    cache = alone("raw")

    def change(table: pa.Table) -> pa.Table:
        data = flipped(table["pixels"][0].as_py())
        return set_cell("pixel_hash", 0, xxhash.xxh3_64_intdigest(data))(set_cell("pixels", 0, data)(table))

    rewrite_view(cache, "digits-00", 0, change)
    (problem,) = verify_cache(cache.url, threads=1).problems
    assert (problem.shard, problem.view, problem.rows) == ("digits-00", 0, 1)
    source = cached_source(cache)
    with raises("cache.pixel-drift"):
        check_canaries(source, cache.config.data)


@pytest.mark.parametrize("pixels", KINDS)
def test_verify_checks_every_stored_view_of_an_intact_cache(stored: Stored, pixels: str) -> None:
    report = verify_cache(stored(pixels).url, threads=1)
    assert (report.problems, dict(report.not_checked)) == ([], {})
    assert report.checked["stored views"] == NUM_VIEWS * NUM_ROWS
    assert report.checked["canaries"] >= NUM_VIEWS * 2


def test_views_that_cannot_be_encoded_again_are_not_comparable(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another encoder, here one with another quality: stored bytes are checked, and no canary is a problem."""
    cache, encode = stored("jpeg:90"), stored_pixels.encode_jpeg
    monkeypatch.setattr(stored_pixels, "ENCODER", "another one")
    monkeypatch.setattr(stored_pixels, "encode_jpeg", lambda view, quality: encode(view, quality - 40))
    report = verify_cache(cache.url, threads=1)
    assert report.problems == []
    assert sum(report.not_checked.values()) >= NUM_VIEWS * 2
    assert report.checked["stored views"] == NUM_VIEWS * NUM_ROWS


def test_rows_of_another_encoder_are_not_compared_with_new_outputs_and_train(stored: Stored, tmp_path: Path) -> None:
    """By the commits of one shard; its eval pass is never encoded, and is compared."""
    cache = copy_of(stored("jpeg:90"), tmp_path / "cache")
    for commit in read_commits(cache.url):
        if commit.shard_id == "digits-01":
            environment = {**commit.environment, "pixel_encoder": "torchvision 0.1"}
            replace_commit(cache, commit.model_copy(update={"environment": environment}))
    republish(cache)
    findings, (first, second) = Findings(), open_cache(cache.url).shards
    recomputed = recompute(cache.url, current_context(cache.config), findings, num_rows=10_000, shard_urls={})
    assert findings.problems == []
    assert [*findings.not_checked.values()] == [NUM_VIEWS * second.num_ok]
    assert "torchvision 0.1" in next(iter(findings.not_checked))
    num_compared = NUM_VIEWS * first.num_ok + NUM_ROWS
    assert (recomputed.rows, recomputed.identical) == (num_compared, num_compared)
    # Stored bytes are checked by their digests.
    report = verify_cache(cache.url, threads=1)
    assert (report.problems, report.checked["stored views"]) == ([], NUM_VIEWS * NUM_ROWS)
    assert check_canaries(cached_source(cache), cache.config.data).num_drifted == 0


def test_a_view_that_is_larger_than_one_read_is_read_in_ranges(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Row groups are small here; their bytes are those of one read, and damage to the last range is noticed."""
    monkeypatch.setattr("pipeline.cache.build.part_writer._ROW_GROUP_BYTES", 4 * 3 * 16 * 16)
    config = _config(_pack(tmp_path), tmp_path / "cache", views={**VIEWS, "pixels": "raw"})
    build(config)
    cache, whole = open_cache(cache_section(config).url), open_cache(stored("raw").url)
    monkeypatch.setattr("pipeline.cache.read.view_range._READ_BYTES", 1)
    for view in range(NUM_VIEWS):
        (data, columns), (expected, same) = (stored_rows(opened, "digits-00", view) for opened in (cache, whole))
        assert data == expected
        assert np.array_equal(columns.logits_NK, same.logits_NK)
        assert columns.row_N.tolist() == same.row_N.tolist()
        assert columns.pixels.hash_N.tolist() == same.pixels.hash_N.tolist()
    committed = cache.committed_view("digits-00", 1)
    path = Path(cache.url) / committed.path
    damaged = bytearray(path.read_bytes())
    damaged[committed.offset + committed.size_bytes - 1] ^= 1
    path.write_bytes(damaged)
    with raises("cache.changed-file"):
        cache.view("digits-00", 1)


@pytest.mark.parametrize("order", [("none", "raw"), ("raw", "none"), ("raw", "raw")])
def test_several_caches_read_the_pixels_of_the_first_that_stores_them(
    stored: Stored, alone: Stored, tmp_path: Path, order: tuple[str, str]
) -> None:
    plain = stored("raw").config
    none = plain.model_copy(
        update={
            "views": plain.views.model_copy(update={"pixels": "none"}),
            "cache": cache_section(plain).model_copy(update={"url": str(tmp_path / "none")}),
        }
    )
    build(none)
    raw = alone("raw")
    caches = {"raw": raw, "none": TinyCache(str(tmp_path / "none"), raw.config)}
    first, second = (caches[name] for name in order)
    assert_same(
        [replace(batch, teacher_outputs=()) for batch in batches(first, second)],
        [replace(batch, teacher_outputs=()) for batch in batches(raw)],
    )


@pytest.mark.parametrize("pixels", KINDS)
@pytest.mark.parametrize("student", [{"size": 24}, {"interpolation": "bicubic"}])
def test_another_input_than_that_of_the_views_is_refused(
    stored: Stored, tmp_path: Path, pixels: str, student: dict[str, Any]
) -> None:
    base, student = stored(pixels).config, {**NORMALISED, **student}
    for mode in ("cache", "online"):
        with raises("config.pixels-input", where="views.pixels"):
            check_training(run_config(base, tmp_path / mode, mode=mode, student=student))
        with raises("config.pixels-input"):
            run(run_config(base, tmp_path / mode, mode=mode, student=student))
    with raises("config.pixels-input"):
        CachedDataset(stored(pixels).url, tail="short", global_batch_size=8, size=24)
    built_later = run_config(base, tmp_path / "later", student=student)
    with raises("config.pixels-input"):
        check_distillation(built_later.model_copy(update={"cache": cache_section(base)}))


def test_other_views_of_the_student_are_refused(stored: Stored, tmp_path: Path) -> None:
    student = {**NORMALISED, "views": {"kind": "crop", "seed": 3}}
    with raises("config.student-views", got="views.pixels: raw, the pixels that the student sees"):
        check_training(run_config(stored("raw").config, tmp_path, student=student))


def test_the_views_of_a_student_alone_are_never_stored(stored: Stored, tmp_path: Path) -> None:
    student = {**NORMALISED, "views": {"kind": "crop", "seed": 3, "pixels": "jpeg:50"}}
    base = stored("raw").config
    config = base.model_copy(
        update={"views": base.views.model_copy(update={"kind": "crop", "cutmix": None, "pixels": "none"})}
    )
    with raises("config.student-views", got="student.views.pixels: jpeg:50"):
        check_training(run_config(config, tmp_path, mode="online", student=student))


def test_a_cache_stores_its_views_in_one_way_from_the_first_part_on(stored: Stored, tmp_path: Path) -> None:
    cache = copy_of(stored("raw"), tmp_path / "cache")
    for pixels in ("none", "jpeg:90"):
        views = cache.config.views.model_copy(update={"pixels": pixels, "count": NUM_VIEWS + 1})
        with raises("cache.other-header"):
            build(cache.config.model_copy(update={"views": views}))
    views = cache.config.views.model_copy(update={"count": NUM_VIEWS + 1})
    build(cache.config.model_copy(update={"views": views}))
    assert len(stored_rows(open_cache(cache.url), "digits-01", NUM_VIEWS)[0]) == 14


def test_a_shard_without_a_usable_image_has_no_stored_views(tmp_path: Path) -> None:
    samples = [(key, {**members, "png": b"bad"}) for key, members in digit_samples(3)]
    shards = pack_shards(samples, f"{tmp_path}/bad-%02d.tar", shard_size=3)
    views, data = {**VIEWS, "pixels": "jpeg:90"}, {"bad_samples": "skip", "max_bad_share": 1.0}
    config = _config(shards, tmp_path / "cache", views=views, cache={"class_means": "none"}, data=data)
    build(config)
    file = io.BytesIO()
    columns = open_cache(cache_section(config).url).view("bad-00", 0, pixels=file)
    assert (file.getvalue(), len(columns.row_N)) == (b"", 0)


def test_what_is_fetched_ahead_is_counted_by_the_bytes_of_stored_views(alone: Stored) -> None:
    cache = alone("raw")
    source = cached_source(cache)
    (first, *_) = shards = source.caches[0].shards
    sizes = [source.caches[0].committed_view(shard.shard_id, 0).size_bytes for shard in shards]
    assert source.fetched_bytes(1) == sum(sizes) // len(sizes) > NUM_ROWS // 2 * 3 * 16 * 16
    source.fetch(0, [1])
    (path,) = node_files(cache)
    assert path.stat().st_size > first.num_ok * 3 * 16 * 16
    assert not storage.exists(shard_urls(cache.config)["digits-00"])


@pytest.mark.slow
@pytest.mark.parametrize("pixels", KINDS)
def test_a_build_that_is_killed_is_continued_to_the_same_bytes(stored: Stored, tmp_path: Path, pixels: str) -> None:
    config = stored(pixels).config
    url = tmp_path / "cache"
    killed = config.model_copy(update={"cache": cache_section(config).model_copy(update={"url": str(url)})})
    (tmp_path / "config.json").write_text(killed.model_dump_json(exclude_unset=True))
    code = (
        "import sys, pathlib; from schemas.config import Config; from tests.pipeline.caches import build\n"
        "build(Config.model_validate_json(pathlib.Path(sys.argv[1]).read_text()))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "config.json")], env=env) as process:
        wait_until(lambda: any(url.glob("commits/*/*.json")), process)
        process.kill()
    build(killed)
    assert files(str(url)) == files(stored(pixels).url)
