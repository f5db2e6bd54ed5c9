"""``train.views_per_image``: batches of several views of each image, which is decoded once."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import open_cache
from pipeline.student.data import shard_files
from pipeline.student.data.batch import Batch, InputSize
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.loader import batch_bytes, load_batches
from pipeline.student.data.sources import RowSource
from pipeline.student.training.config_checks import check_distillation
from pipeline.student.training.micro_batches import micro_batches
from pipeline.student.training.trainer import train
from schemas.config import ViewsConfig
from stillroom import CachedDataset
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.caches import cache_section
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.data.test_dataset import assert_same, logits
from tests.pipeline.student.runs import (
    ALL_TERMS,
    NORMALISED,
    assert_weights_close,
    cached_source,
    check_resume,
    dataset,
    indexed_source,
    metrics,
    run_config,
    state_of,
    training_error,
)

NUM_IMAGES = 35
ViewOf = tuple[str, int]


def batches(source: RowSource, plan: ViewsConfig, views_per_image: int, **changes: Any) -> StepDataset:
    return dataset(source, plan, {"views_per_image": views_per_image}, **changes)


def epoch_of(steps: StepDataset, epoch: int) -> list[Batch]:
    num_steps = steps.order.num_steps
    return [steps[epoch * num_steps + step] for step in range(num_steps)]


def rows_of(batch: Batch, views: list[int], offsets: list[int]) -> dict[ViewOf, dict[str, Any]]:
    """What a network takes of each (image, view), and its partner."""
    partners = range(batch.num_rows) if batch.partner_B is None else batch.partner_B.tolist()
    return {
        (sample, views[offset]): {
            "pixels": batch.pixels_BCHW[row],
            **{
                f"{name} of teacher {number}": values[row]
                for number, outputs in enumerate(batch.teacher_outputs)
                for name, values in (("logits", outputs.at("logits")), ("norm", outputs.norm_B))
                if values is not None
            },
            "label": batch.targets["label"][row],
            "lambda": None if batch.lambda_B is None else batch.lambda_B[row],
            "box": None if batch.cutmix_box_B4 is None else batch.cutmix_box_B4[row],
            "partner": (batch.sample_ids[partner], views[offsets[partner]]),
        }
        for row, (sample, offset, partner) in enumerate(zip(batch.sample_ids, offsets, partners, strict=True))
    }


def rows_of_epoch(steps: StepDataset, epoch: int) -> dict[ViewOf, dict[str, Any]]:
    order = steps.order
    views = [steps.source.view_of(number) for number in order.views(epoch)]
    found: dict[ViewOf, dict[str, Any]] = {}
    for step, batch in enumerate(epoch_of(steps, epoch)):
        offsets = order.epoch(epoch, views[0]).rows(step, steps.rank, steps.world_size).view_B.tolist()
        rows = rows_of(batch, views, offsets)
        assert len(rows) == batch.num_rows
        assert not {*rows} & {*found}
        found |= rows
    return found


def assert_same_rows(rows: dict[ViewOf, dict[str, Any]], expected: dict[ViewOf, dict[str, Any]]) -> None:
    """Bitwise."""
    assert {*rows} == {*expected}
    for key, columns in rows.items():
        assert {*columns} == {*expected[key]}
        for name, value in columns.items():
            other = expected[key][name]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, (key, name)


@pytest.mark.parametrize(
    "kinds",
    [["crop"], ["repeated"], ["raw"], ["jpeg"], ["repeated", "raw"], ["raw", "wide"]],
    ids="+".join,
)
def test_an_epoch_has_the_rows_of_two_epochs_of_one_view_each(
    replays: Replay, wide_caches: Replay, kinds: list[str]
) -> None:
    """Also of views that a cache stores, and of several caches, one of which has fewer views."""
    cache, *others = (wide_caches("repeated") if kind == "wide" else replays(kind) for kind in kinds)
    source, plan = cached_source(cache, *others), cache.config.views
    single, double = batches(source, plan, 1), batches(source, plan, 2)
    for epoch in (0, NUM_VIEWS // 2 + 1):
        rows = rows_of_epoch(double, epoch)
        assert len(rows) == 2 * NUM_IMAGES
        assert {f"logits of teacher {number}" for number in range(len(kinds))} <= {*next(iter(rows.values()))}
        assert_same_rows(rows, rows_of_epoch(single, 2 * epoch) | rows_of_epoch(single, 2 * epoch + 1))


def test_stored_views_are_those_that_are_rendered(replays: Replay) -> None:
    """Of raw pixels, whose views are the same; also where the pixels are those of the second cache."""
    rendered, stored = replays("repeated"), replays("raw")
    plan = rendered.config.views
    expected = epoch_of(batches(cached_source(rendered), plan, 2), 1)
    for caches in ([stored], [rendered, stored]):
        source = cached_source(*caches)
        assert source.stores_views
        found = epoch_of(batches(source, plan, 2), 1)
        assert_same([replace(batch, teacher_outputs=batch.teacher_outputs[:1]) for batch in found], expected)


@pytest.mark.parametrize("kinds", [["crop"], ["repeated"], ["raw", "wide"]], ids="+".join)
def test_two_ranks_have_the_rows_of_one(replays: Replay, wide_caches: Replay, kinds: list[str]) -> None:
    """The last step is short, and a rank may have no row of it."""
    cache, *others = (wide_caches("repeated") if kind == "wide" else replays(kind) for kind in kinds)
    source, plan = cached_source(cache, *others), cache.config.views
    alone = batches(source, plan, 2)
    ranks = [batches(source, plan, 2, rank=rank, world_size=2) for rank in range(2)]
    for epoch in (0, 1):
        first, second = (rows_of_epoch(steps, epoch) for steps in ranks)
        assert not {*first} & {*second}
        assert_same_rows(first | second, rows_of_epoch(alone, epoch))
        for whole, *shares in zip(*(epoch_of(steps, epoch) for steps in (alone, *ranks)), strict=True):
            assert whole.sample_ids == [sample for share in shares for sample in share.sample_ids]
            assert {share.num_rows_global for share in shares} == {whole.num_rows}


@pytest.mark.parametrize("kind", ["crop", "repeated", "jpeg"])
@pytest.mark.parametrize("world_size", [1, slow(2)])
def test_parity_batches_of_cached_and_online_views_are_bitwise_equal(
    replays: Replay, tmp_path: Path, kind: str, world_size: int
) -> None:
    # The student of stored views has their size.
    cache, size = replays(kind), InputSize(16 if kind == "jpeg" else 11, "bilinear")
    plan, sampled = cache.config.views, indexed_source(cache.config, tmp_path)
    for rank in range(world_size):
        keys: dict[str, Any] = {"rank": rank, "world_size": world_size, "student": size}
        replayed, online = (batches(source, plan, 2, **keys) for source in (cached_source(cache), sampled))
        for epoch in range(NUM_VIEWS // 2):
            stored = [replace(batch, teacher_outputs=()) for batch in epoch_of(replayed, epoch)]
            assert_same(stored, epoch_of(online, epoch))


def test_online_views_are_counted_over_all_epochs_and_do_not_repeat(replays: Replay, tmp_path: Path) -> None:
    config = replays("crop").config
    sampled, plan = indexed_source(config, tmp_path), config.views
    single, double = batches(sampled, plan, 1), batches(sampled, plan, 4)
    batch = double[NUM_VIEWS * double.order.num_steps]
    expected = {
        (sample, number): pixels
        for number in double.order.views(NUM_VIEWS)
        for later in epoch_of(single, number)
        for sample, pixels in zip(later.sample_ids, later.pixels_BCHW, strict=True)
    }
    numbers = [*double.order.views(NUM_VIEWS)] * (batch.num_rows // 4)
    assert numbers[:4] == [24, 25, 26, 27]
    for sample, number, pixels in zip(batch.sample_ids, numbers, batch.pixels_BCHW, strict=True):
        assert torch.equal(pixels, expected[sample, number])


def test_after_the_last_view_follows_the_first(replays: Replay) -> None:
    """Six views, four at a time: 0 to 3, 4 to 1, 2 to 5."""
    cache = replays("crop")
    steps = batches(cached_source(cache), cache.config.views, 4)
    shown = [Counter(view for _, view in rows_of_epoch(steps, epoch)) for epoch in range(3)]
    assert [sorted(views) for views in shown] == [[0, 1, 2, 3], [0, 1, 4, 5], [2, 3, 4, 5]]
    assert all({*views.values()} == {NUM_IMAGES} for views in shown)


@pytest.mark.parametrize("kind", ["crop", "repeated"])
@pytest.mark.parametrize("views_per_image", [1, 2])
def test_each_image_of_a_batch_is_decoded_once(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, views_per_image: int
) -> None:
    """Also for a student and an online teacher of different sizes."""
    decoded, decode = Counter[int](), shard_files.decode

    def counted(data: bytes, *, max_pixels: int) -> Tensor:
        decoded[hash(data)] += 1
        return decode(data, max_pixels=max_pixels)

    monkeypatch.setattr(shard_files, "decode", counted)
    config = replays(kind).config
    sampled = indexed_source(config, tmp_path)
    steps = batches(sampled, config.views, views_per_image, teachers=[InputSize(12, "bilinear")])
    epoch_of(steps, 1)
    assert len(decoded) == NUM_IMAGES
    assert {*decoded.values()} == {1}


def test_a_student_with_separate_views_sees_as_many_of_them(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    own = ViewsConfig.model_validate({"kind": "crop", "seed": 5, "jitter": {}})
    alone = indexed_source(cache.config.model_copy(update={"views": own}), tmp_path)
    stored, plan = cached_source(cache), cache.config.views
    # Epoch 4 shows the teacher's views 2 and 3, and the student's 8 and 9.
    apart = epoch_of(batches(stored, plan, 2, student_views=own), 4)
    seen, taught = epoch_of(batches(alone, own, 2), 4), epoch_of(batches(stored, plan, 2), 4)
    for batch, student, teacher in zip(apart, seen, taught, strict=True):
        assert torch.equal(batch.pixels_BCHW, student.pixels_BCHW)
        assert torch.equal(logits(batch), logits(teacher))


def test_loader_processes_change_no_batch_and_need_the_memory_that_is_checked(replays: Replay) -> None:
    cache = replays("repeated")
    steps = batches(cached_source(cache), cache.config.views, 2)
    alone, loaded = (list(load_batches(steps, range(12), num_workers=n, pin_memory=False)) for n in (0, 2))
    assert_same(loaded, alone)
    assert batch_bytes(steps) == 8 * (3 * 16 * 16 + 4 * 10)


def test_micro_batches_keep_partners_together(replays: Replay) -> None:
    cache = replays("repeated")
    steps = batches(cached_source(cache), cache.config.views, 2)
    for whole in epoch_of(steps, 0):
        chunks = micro_batches(whole, 2)
        partners = [chunk.sample_ids[row] for chunk in chunks for row in chunk.partner_B.tolist()]
        assert partners == [whole.sample_ids[row] for row in whole.partner_B.tolist()]
        assert [sample for chunk in chunks for sample in chunk.sample_ids] == whole.sample_ids


@pytest.mark.parametrize("kind", ["crop", "repeated"])
def test_accumulated_gradients_are_those_of_the_whole_batch(replays: Replay, tmp_path: Path, kind: str) -> None:
    base = replays(kind).config
    keys = {"global_batch_size": 16, "views_per_image": 2, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1}
    for accumulate in (1, 3):
        train(run_config(base, tmp_path / str(accumulate), train={**keys, "accumulate": accumulate}))
    whole, accumulated = (metrics(tmp_path / str(accumulate)) for accumulate in (1, 3))
    error = training_error(run_config(base, tmp_path, train=keys), len(whole))
    assert [record["loss"] for record in accumulated] == pytest.approx([record["loss"] for record in whole], rel=error)
    weights, expected = (state_of(tmp_path / str(accumulate))["model"] for accumulate in (3, 1))
    assert_weights_close(weights, expected, error)


def test_a_resume_is_bitwise(replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint within an epoch of 6 steps: 5 of 12 rows and one of 10."""
    monkeypatch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 1)
    base = replays("repeated").config
    keys: dict[str, Any] = {
        "data": {"val_shards": base.data.shards},
        "loss": ALL_TERMS,
        "student": NORMALISED,
        "train": {"epochs": 2, "global_batch_size": 12, "views_per_image": 2, "checkpoint_every_steps": 4},
    }
    check_resume(lambda url: run_config(base, url, **keys), tmp_path, stop=("step", 10), first_step=8)


def test_a_run_reports_images_and_views(replays: Replay, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    keys = {"epochs": 1, "global_batch_size": 16, "views_per_image": 4, "tail": "short"}
    summary = train(run_config(replays("crop").config, tmp_path, train=keys), report=events.append)
    (begin,) = (event for event in events if event["kind"] == "begin")
    for report in (begin, summary):
        assert (report["images_per_epoch"], report["views_per_image"]) == (NUM_IMAGES, 4)
    assert begin["steps_per_epoch"] == 9
    last = [event for event in events if event["kind"] == "step"][-1]
    assert last["views_per_s"] == pytest.approx(4 * last["images_per_s"], abs=0.05)
    plain = train(run_config(replays("crop").config, tmp_path / "plain", train={"epochs": 1}))
    assert not {"images_per_epoch", "views_per_image"} & {*plain}


def test_the_public_dataset_has_the_batches_of_the_training_loop(replays: Replay) -> None:
    cache = replays("repeated")
    steps = batches(cached_source(cache), cache.config.views, 2)
    with closing(
        CachedDataset(cache.url, epoch=1, global_batch_size=8, tail="short", size=16, views_per_image=2)
    ) as found:
        assert (len(found), found.num_views) == (9, NUM_VIEWS)
        shown = list(found)
    assert_same([batch.rows for batch in shown], epoch_of(steps, 1))
    assert {*Counter(shown[0].sample_ids).values()} == {2}


def test_repeated_partners_are_part_of_the_views_and_stored(replays: Replay) -> None:
    cache = open_cache(replays("repeated").url)
    assert cache.header.views["mix_repeat"] == 2
    assert "mix_repeat" not in open_cache(replays("function_matching").url).header.views
    (first, *_) = cache.shards
    partners = [cache.view(first.shard_id, view).mix_row_N.tolist() for view in range(NUM_VIEWS)]
    assert partners[0] == partners[1] != partners[2] == partners[3] != partners[4] == partners[5]
    lambdas = [cache.view(first.shard_id, view).mix_lambda_N.tolist() for view in range(2)]
    assert lambdas[0] != lambdas[1]
    assert "mix_repeat 2" in inspect_cache(cache.url).views


@pytest.mark.parametrize(
    ("kind", "sections", "code", "fields"),
    [
        ("crop", {"train": {"views_per_image": 7}}, "train.too-few-views", {"expected": "1 to 6"}),
        ("crop", {"data": {"num_views": 2}, "train": {"views_per_image": 4}}, "train.too-few-views", {"got": 4}),
        ("crop", {"train": {"views_per_image": 3}}, "train.partial-images", {"expected": "a multiple of 3"}),
        ("function_matching", {"train": {"views_per_image": 2}}, "train.partners-differ", {}),
        ("repeated", {"train": {"views_per_image": 4}}, "train.partners-differ", {}),
        ("repeated", {"data": {"num_views": 3}, "train": {"views_per_image": 2}}, "train.views-not-multiple", {}),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_a_training_and_before_a_cache_is_built(
    replays: Replay, tmp_path: Path, kind: str, sections: dict[str, Any], code: str, fields: dict[str, Any]
) -> None:
    config = run_config(replays(kind).config, tmp_path / "run", **sections)
    with raises(code, **fields):
        train(config)
    assert not (tmp_path / "run").exists()
    url = str(tmp_path / "to-build")
    section = cache_section(replays(kind).config).model_copy(update={"url": url})
    planned = config.model_copy(
        update={"cache": section, "data": config.data.model_copy(update={"cache": url})},
    )
    with raises(code, **fields):
        check_distillation(planned)


@pytest.mark.parametrize("mode", ["online", "none"])
def test_eval_views_are_one_view(replays: Replay, tmp_path: Path, mode: str) -> None:
    base = replays("crop").config
    sections: dict[str, Any] = {"views": {"kind": "eval", "count": 1}, "train": {"views_per_image": 2}}
    loss = [{"name": "ce"}] if mode == "none" else [{"name": "kd", "temperature": 1.0}]
    config = run_config(base, tmp_path / "run", mode=mode, loss=loss, **sections)
    indexed_source(config, tmp_path / "run" / "index")
    with raises("train.too-few-views", expected="1 to 1 (kind eval has one view)"):
        train(config)


def test_a_run_continues_with_as_many_views_alone(replays: Replay, tmp_path: Path) -> None:
    base, keys = replays("crop").config, {"epochs": 1}
    train(run_config(base, tmp_path, train=keys))
    with raises("run.other-config", got="train.views_per_image: 1 -> 2"):
        train(run_config(base, tmp_path, train={**keys, "views_per_image": 2}))
