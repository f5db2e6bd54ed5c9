"""Batches: equal for any number of loader processes and ranks, and the same views whether cached or sampled online."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from pipeline.augment.pixels import to_input
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import CacheError, ShardError
from pipeline.student.data.batch import Batch, InputSize
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.loader import load_batches
from pipeline.student.data.sources import CachedSource, IndexedSource
from pipeline.teacher.inference import load_teacher
from schemas.cache_format import aug_param_columns
from schemas.config import DataConfig, ViewsConfig
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.caches import TinyCache, shard_urls
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.runs import cached_source, dataset, indexed_source, rewrite_view, set_cell, set_column
from tests.tolerances import magnitude_of, network_operations, reordered

KINDS = ["crop", "function_matching", "everything"]
STEPS_AN_EPOCH = 5


def cached(cache: TinyCache, **changes: object) -> StepDataset:
    return dataset(cached_source(cache), cache.config.views, **changes)


def load(batches: StepDataset, steps: range, num_workers: int = 0) -> list[Batch]:
    return list(load_batches(batches, steps, num_workers=num_workers, pin_memory=False))


def assert_same(batches: Iterable[Batch], expected: Iterable[Batch]) -> None:
    for batch, same in zip(batches, expected, strict=True):
        for item in fields(Batch):
            actual, value = getattr(batch, item.name), getattr(same, item.name)
            if item.name == "teacher_outputs":
                for outputs, same_outputs in zip(actual, value, strict=True):
                    assert_same_tensors(outputs.tensors, same_outputs.tensors)
                    assert torch.equal(outputs.norm_B, same_outputs.norm_B)
            elif item.name in ("targets", "teacher_pixels"):
                assert_same_tensors(actual, value)
            elif isinstance(actual, Tensor):
                assert_same_tensors({item.name: actual}, {item.name: value})
            else:
                assert actual == value, item.name


def assert_same_tensors(tensors: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]) -> None:
    assert [*tensors] == [*expected]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
        # Another memory format may have other sums in a convolution.
        assert tensor.stride() == expected[name].stride(), name


def logits(batch: Batch) -> Tensor:
    logits_BK = batch.teacher_outputs[0].at("logits")
    assert logits_BK is not None
    return logits_BK


def partners(batch: Batch) -> dict[str, str]:
    assert batch.partner_B is not None
    return dict(zip(batch.sample_ids, [batch.sample_ids[row] for row in batch.partner_B.tolist()], strict=True))


def test_loader_processes_change_no_batch(replays: Replay, tmp_path: Path) -> None:
    batches, steps = cached(replays("function_matching")), range(3, 9)
    assert_same(load(batches, steps, num_workers=2), load(batches, steps))
    config = replays("crop").config
    sizes = [InputSize(12, "bilinear"), InputSize(128, "bicubic")]
    online = dataset(indexed_source(config, tmp_path), config.views, teachers=sizes)
    (batch, *_) = alone = load(online, range(3))
    assert [*batch.teacher_pixels] == sizes
    assert_same(load(online, range(3), num_workers=1), alone)


@pytest.mark.parametrize(
    ("kind", "world_size"), [("crop", 2), ("function_matching", 3), ("function_matching", 2), ("everything", 4)]
)
def test_the_concatenated_batches_of_the_ranks_are_the_batch_of_one_process(
    replays: Replay, kind: str, world_size: int
) -> None:
    cache = replays(kind)
    whole = cached(cache)
    shares = [cached(cache, rank=rank, world_size=world_size) for rank in range(world_size)]
    # The short step of three rows leaves nothing for some of three ranks, which training refuses.
    steps = range(7) if world_size == 2 else (0, 1, 2, 3, 5, 6)
    for step in steps:
        batch, parts = whole[step], [share[step] for share in shares]
        assert [name for part in parts for name in part.sample_ids] == batch.sample_ids
        assert torch.equal(torch.cat([part.pixels_BCHW for part in parts]), batch.pixels_BCHW)
        assert torch.equal(torch.cat([part.targets["label"] for part in parts]), batch.targets["label"])
        assert torch.equal(torch.cat([logits(part) for part in parts]), logits(batch))
        assert torch.equal(
            torch.cat([part.teacher_outputs[0].norm_B for part in parts]), batch.teacher_outputs[0].norm_B
        )
        assert {part.num_rows_global for part in parts} == {len(batch.sample_ids)}
        if kind != "crop":
            assert torch.equal(torch.cat([part.lambda_B for part in parts]), batch.lambda_B)
            assert {key: value for part in parts for key, value in partners(part).items()} == partners(batch)


def test_any_step_comes_alone_as_it_comes_in_its_turn_and_an_epoch_shows_each_sample_once(replays: Replay) -> None:
    cache = replays("function_matching")
    whole = load(cached(cache), range(2 * STEPS_AN_EPOCH))
    for first in (3, 5, 9):
        assert_same(load(cached(cache), range(first, 2 * STEPS_AN_EPOCH)), whole[first:])
    seen = [name for batch in whole[:STEPS_AN_EPOCH] for name in batch.sample_ids]
    assert len({*seen}) == len(seen) == 35


def both(cache: TinyCache, folder: Path) -> tuple[CachedSource, IndexedSource]:
    return cached_source(cache), indexed_source(cache.config, folder)


@pytest.mark.parametrize("world_size", [slow(1), slow(2), 3, slow(4)])
@pytest.mark.parametrize("kind", [slow("crop"), "function_matching", "everything"])
def test_parity_views_of_cached_and_online_are_bitwise_equal_for_any_world_size(
    replays: Replay, tmp_path: Path, kind: str, world_size: int
) -> None:
    cache = replays(kind)
    stored, sampled = both(cache, tmp_path)
    plan = cache.config.views
    # The short step of three rows leaves nothing for some of three ranks, which training refuses.
    rows = STEPS_AN_EPOCH if world_size <= 2 else STEPS_AN_EPOCH - 1
    for rank in range(world_size):
        replayed, online = (dataset(source, plan, rank=rank, world_size=world_size) for source in (stored, sampled))
        for step in (epoch * STEPS_AN_EPOCH + local for epoch in range(NUM_VIEWS) for local in range(rows)):
            assert_same([replace(replayed[step], teacher_outputs=())], [online[step]])


@pytest.mark.parametrize("kind", KINDS)
def test_parity_parameters_of_cached_and_online_views_are_bitwise_equal(
    replays: Replay, tmp_path: Path, kind: str
) -> None:
    cache = replays(kind)
    stored, sampled = both(cache, tmp_path)
    plan = cache.config.views
    for epoch in range(NUM_VIEWS):
        for shard, num_ok in enumerate(stored.num_ok):
            ordinal_N = np.arange(num_ok, dtype=np.int32)
            one, other = (source.rows(shard, ordinal_N, epoch) for source in (stored, sampled))
            assert one.sample_ids == other.sample_ids
            for name in ("box", "flip", "partner", "mix_lambda", "content_hash", "offset", "size"):
                assert np.array_equal(one.rows_N[name], other.rows_N[name]), name
            assert [*one.aug_params] == [*other.aug_params] == [*aug_param_columns(plan)]
            for name, values in one.aug_params.items():
                assert values.dtype == other.aug_params[name].dtype, name
                assert np.array_equal(values, other.aug_params[name]), name


def test_a_cache_repeats_its_views_and_online_training_does_not(replays: Replay, tmp_path: Path) -> None:
    stored, sampled = both(replays("crop"), tmp_path)
    assert [stored.view_of(epoch) for epoch in (0, NUM_VIEWS - 1, NUM_VIEWS, 2 * NUM_VIEWS + 1)] == [
        0,
        NUM_VIEWS - 1,
        0,
        1,
    ]
    assert [sampled.view_of(epoch) for epoch in (0, NUM_VIEWS, 70_000)] == [0, NUM_VIEWS, 70_000]
    rows = np.arange(20, dtype=np.int32)
    first, later = (sampled.rows(0, rows, epoch).rows_N for epoch in (0, NUM_VIEWS))
    assert not np.array_equal(first["box"], later["box"])


def test_online_training_samples_options_beyond_the_views_of_any_cache(replays: Replay, tmp_path: Path) -> None:
    source = indexed_source(replays("everything").config, tmp_path)
    rows = np.arange(20, dtype=np.int32)
    # Their lowest 16 bits are equal.
    early, late = (source.rows(0, rows, epoch).aug_params for epoch in (4464, 65_536 + 4464))
    assert [*early] == [*late]
    assert not np.array_equal(early["op1_magnitude"], late["op1_magnitude"])


def teacher_input(cache: TinyCache) -> InputSize:
    header = open_cache(cache.url).header.teacher
    return InputSize(int(header["size"]), header["interpolation"])


@pytest.mark.parametrize(
    ("kind", "student_size"),
    [
        ("crop", 16),
        ("function_matching", 11),
        ("everything", 11),
        slow("function_matching", 24),
        slow("everything", 16),
    ],
)
def test_parity_outputs_of_cached_and_online_teacher(
    replays: Replay, tmp_path: Path, kind: str, student_size: int
) -> None:
    """Also where the student has a different input size, so that its pixels are not the teacher's."""
    cache = replays(kind)
    config, size = cache.config, teacher_input(cache)
    stored, sampled = both(cache, tmp_path)
    student = InputSize(student_size, "bilinear")
    online = dataset(sampled, config.views, student=student, teachers=[size])
    replayed = dataset(stored, config.views, student=student)
    teacher = load_teacher(config.teacher, widths={"logits": 10}, size=size.size, device=torch.device("cpu"))
    images_BCHW = torch.zeros(1, 3, size.size, size.size)
    error = reordered(network_operations(teacher.module, images_BCHW, backward=False))
    for step in range(0, NUM_VIEWS * STEPS_AN_EPOCH, 7):
        batch, expected = online[step], replayed[step]
        assert torch.equal(batch.pixels_BCHW, expected.pixels_BCHW)
        assert batch.pixels_BCHW.shape[2:] == (student_size, student_size)
        pixels = batch.teacher_pixels.get(size, batch.pixels_BCHW)
        outputs = teacher.forward(pixels, batch.partner_B, batch.lambda_B, batch.cutmix_box_B4)
        for actual, cached in (
            (outputs["logits"], logits(expected)),
            (outputs["embedding"].norm(dim=1), expected.teacher_outputs[0].norm_B),
        ):
            torch.testing.assert_close(actual, cached, rtol=0, atol=error * magnitude_of(cached))


def test_a_plan_with_all_options_applies_each_of_them(replays: Replay) -> None:
    """Otherwise parity would hold for options that are never applied."""
    source = cached_source(replays("everything"))
    rows = [
        source.rows(shard, np.arange(num_ok, dtype=np.int32), epoch)
        for epoch in range(NUM_VIEWS)
        for shard, num_ok in enumerate(source.num_ok)
    ]
    sampled = {name: np.concatenate([view.aug_params[name] for view in rows]) for name in rows[0].aug_params}
    assert {*sampled["op1"].tolist(), *sampled["op2"].tolist()} == {*range(14)}
    assert len({*sampled["jitter_order"].tolist()}) == 24
    for name, neutral in (("jitter_hue", 0), ("erase_width", 0), ("cut_width", 0)):
        assert 0 < (sampled[name] == neutral).sum() < len(sampled[name])


def test_inputs_of_a_build_and_of_training_are_the_same_bits(replays: Replay) -> None:
    """The build mixes a batch with partners in a different batch, training with partners in the same batch."""
    cache = replays("everything")
    batches = cached(cache, student=teacher_input(cache))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    for step in range(STEPS_AN_EPOCH):
        batch = batches[step]
        assert batch.partner_B is not None
        assert batch.cutmix_box_B4 is not None
        mixing = {"partner_B": batch.partner_B, "lambda_B": batch.lambda_B, "cutmix_box_B4": batch.cutmix_box_B4}
        whole = to_input(batch.pixels_BCHW, mean_C=mean, std_C=std, **mixing)
        for row in range(len(batch.sample_ids)):
            alone = to_input(
                batch.pixels_BCHW[row : row + 1],
                mean_C=mean,
                std_C=std,
                **{name: values[row : row + 1] for name, values in mixing.items() if values is not None},
                partner_pixels_NCHW=batch.pixels_BCHW,
            )
            assert torch.equal(alone[0], whole[row])


def test_one_rendering_serves_all_networks_of_the_same_input(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    sampled, plan = indexed_source(cache.config, tmp_path), cache.config.views
    same, other, small = InputSize(16, "bilinear"), InputSize(16, "bicubic"), InputSize(12, "bilinear")
    assert dataset(sampled, plan, teachers=[same, same])[0].teacher_pixels == {}
    batch = dataset(sampled, plan, teachers=[small, same, other, small])[0]
    assert [*batch.teacher_pixels] == [small, other]
    for sizes, pixels_BCHW in batch.teacher_pixels.items():
        assert torch.equal(pixels_BCHW, dataset(sampled, plan, student=sizes)[0].pixels_BCHW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crop", "eval"])
def test_a_student_with_separate_views_sees_those_of_an_online_run_with_that_plan(
    replays: Replay, tmp_path: Path, kind: str
) -> None:
    cache = replays("crop")
    stored = cached_source(cache)
    own = ViewsConfig.model_validate({"kind": kind, "seed": 5, "jitter": {} if kind == "crop" else None})
    alone = indexed_source(cache.config.model_copy(update={"views": own}), tmp_path)
    steps = range(0, (NUM_VIEWS + 1) * STEPS_AN_EPOCH, 3)
    plan = cache.config.views
    apart = load(dataset(stored, plan, student_views=own), steps)
    for batch, seen, teacher_batch in zip(
        apart, load(dataset(alone, own), steps), load(dataset(stored, plan), steps), strict=True
    ):
        assert torch.equal(batch.pixels_BCHW, seen.pixels_BCHW)
        assert not torch.equal(batch.pixels_BCHW, teacher_batch.pixels_BCHW)
        assert batch.sample_ids == seen.sample_ids == teacher_batch.sample_ids
        assert torch.equal(logits(batch), logits(teacher_batch))


def test_an_online_teacher_and_its_student_may_see_different_views(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    sampled = indexed_source(cache.config, tmp_path)
    plan, own, size = cache.config.views, ViewsConfig.model_validate({"kind": "eval"}), InputSize(16, "bilinear")
    batches = dataset(sampled, plan, teachers=[size], student_views=own)
    for step in range(0, 2 * STEPS_AN_EPOCH, 2):
        batch, together = batches[step], dataset(sampled, plan)[step]
        assert torch.equal(batch.teacher_pixels[size], together.pixels_BCHW)
        assert not torch.equal(batch.pixels_BCHW, together.pixels_BCHW)


def swap_partners(table: pa.Table) -> pa.Table:
    """Two pairs swap partners: rows, content and order do not change."""
    partner_rows = table["mix_row"].to_pylist()
    first = partner_rows[0]
    second = next(row for row, partner in enumerate(partner_rows) if row not in (0, first) and partner != row)
    third = partner_rows[second]
    for row, partner in ((0, second), (first, third)):
        partner_rows[row], partner_rows[partner] = partner, row
    return set_column(table, "mix_row", partner_rows)


@pytest.mark.parametrize(
    ("kind", "change"), [("function_matching", swap_partners), ("crop", set_cell("mix_row", 3, 4))], ids=["", "unmixed"]
)
def test_partners_that_are_not_the_orders_stop_training(
    replay_copy: Replay, kind: str, change: Callable[[pa.Table], pa.Table]
) -> None:
    cache = replay_copy(kind)
    rewrite_view(cache, "digits-00", 0, change)
    with raises("cache.partner-mismatch"):
        load(cached(cache), range(STEPS_AN_EPOCH))


def shards_with_a_changed_image(cache: TinyCache, folder: Path) -> tuple[DataConfig, str]:
    """Copies of the shards in which one bit of one image differs, at the same offset and size."""
    opened = open_cache(cache.url)
    index = opened.index(opened.shards[1])
    folder.mkdir()
    urls = shard_urls(cache.config)
    for shard_id, url in urls.items():
        data = bytearray(Path(url).read_bytes())
        if shard_id == "digits-01":
            data[int(index.offset[7]) + int(index.size[7]) // 2] ^= 1
        (folder / Path(url).name).write_bytes(bytes(data))
    shards = tuple(str(folder / Path(url).name) for url in urls.values())
    return cache.config.data.model_copy(update={"shards": shards}), index.sample_ids([7])[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_changed_image_bytes_stop_training_by_name_after_the_batches_before_them(
    replays: Replay, tmp_path: Path, num_workers: int
) -> None:
    cache = replays("crop")
    data, sample_id = shards_with_a_changed_image(cache, tmp_path / "changed")
    whole = load(cached(cache), range(STEPS_AN_EPOCH))
    step = next(step for step, batch in enumerate(whole) if sample_id in batch.sample_ids)
    changed = TinyCache(cache.url, cache.config.model_copy(update={"data": data}))
    batches = load_batches(cached(changed), range(STEPS_AN_EPOCH), num_workers=num_workers, pin_memory=False)
    assert [next(batches).step for _ in range(step)] == list(range(step))
    with raises("shard.image-changed", CacheError, where=sample_id, exit_code=2) as caught:
        next(batches)
    assert "Traceback" not in str(caught.value)


def test_an_image_beyond_the_pixel_limit_is_a_shard_error(replays: Replay) -> None:
    with raises("shard.image-undecodable-now", ShardError) as caught:
        cached(replays("crop"), max_pixels=5)[0]
    assert str(caught.value.got).startswith("too_large")


def test_a_row_without_a_label_is_named_before_it_reaches_the_device(replay_copy: Replay, tmp_path: Path) -> None:
    cache = replay_copy("crop")
    unlabelled = cache.config.data.model_copy(update={"label": None})
    source = indexed_source(cache.config.model_copy(update={"data": unlabelled}), tmp_path / "index")
    batches = dataset(source, cache.config.views, required_targets=("label",))
    with raises("data.missing-labels") as caught:
        batches[0]
    assert str(caught.value.where).startswith("digits-0")


def test_more_ranks_than_lanes_are_refused(replays: Replay) -> None:
    with raises("train.more-ranks-than-lanes"):
        cached(replays("function_matching"), rank=0, world_size=5)
