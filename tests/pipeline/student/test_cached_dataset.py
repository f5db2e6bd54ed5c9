"""The public dataset: the batches of Stillroom's training loop, for any loader and world size, in any loop."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

import pipeline.student as former
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import CacheError, ConfigError, OrderError
from pipeline.student.losses import BatchShare, LossInputs, ce
from stillroom import CachedBatch, CachedDataset
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.caches import TinyCache, build, cache_section, shard_urls
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.runs import CE, KD, SMALL, rewrite_view, run_config, set_cell, trainer_of
from tests.tolerances import ulps

STEPS = 5
Opener = Callable[..., CachedDataset]


@pytest.fixture
def opener() -> Iterator[Opener]:
    """``opener(cache)``: batches of 8 of every row of a cache, unless changed. Closed after the test."""
    opened: list[CachedDataset] = []

    def open_(cache: TinyCache | Path | str | list[str], **options: Any) -> CachedDataset:
        url = cache.url if isinstance(cache, TinyCache) else cache
        opened.append(CachedDataset(url, **{"global_batch_size": 8, "tail": "short", **options}))
        return opened[-1]

    yield open_
    for dataset in opened:
        dataset.close()


@contextmanager
def refused(kind: type[Exception], **options: Any) -> Iterator[pytest.ExceptionInfo[Any]]:
    """An error out of a loader, whose frames hold it: collected with them, it would wait 5 s for each process."""
    with pytest.raises(kind, **options) as caught:
        yield caught
    traceback.clear_frames(caught.tb)


def assert_same(batches: Iterable[CachedBatch], expected: Iterable[CachedBatch]) -> None:
    for batch, same in zip(batches, expected, strict=True):
        assert (batch.sample_ids, batch.epoch, batch.step) == (same.sample_ids, same.epoch, same.step)
        assert torch.equal(batch.images(), same.images())
        assert torch.equal(batch.teacher_logits(), same.teacher_logits())
        assert torch.equal(batch.targets(), same.targets())
        assert batch.ddp_weight == same.ddp_weight


class LossSpy:
    """A loss that records its inputs."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.given: list[tuple[LossInputs, BatchShare]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def summands(self, inputs: LossInputs, share: BatchShare, *, epoch: int) -> tuple[dict[str, Tensor], ...]:
        self.given.append((inputs, share))
        return self.loss.summands(inputs, share, epoch=epoch)


@pytest.mark.parametrize("kind", ["crop", "function_matching", slow("everything")])
def test_student_and_loss_are_given_what_the_training_loop_gives_them(
    replays: Replay, opener: Opener, kind: str, tmp_path: Path
) -> None:
    cache = replays(kind)
    trainer = trainer_of(run_config(cache.config, tmp_path, loss=[*CE, *KD]))
    images: list[Tensor] = []
    trainer.train_step.student.register_forward_pre_hook(lambda _, args: images.append(args[0].clone()))
    spy: Any = LossSpy(trainer.train_step.loss)
    trainer.train_step.loss = spy
    trainer.run()
    trainer.setup.close()

    dataset = opener(cache, mean=SMALL["mean"], std=SMALL["std"])
    batches = list(dataset)
    dataset.set_epoch(1)
    batches += dataset
    assert len(batches) == 2 * STEPS
    for batch, images_BCHW, (inputs, share) in zip(batches, images, spy.given, strict=True):
        assert torch.equal(batch.images(), images_BCHW)
        assert torch.equal(batch.teacher_logits(), inputs.teachers[0].outputs.at("logits"))
        assert torch.equal(batch.teacher_norms(), inputs.teachers[0].outputs.norm_B)
        assert torch.equal(batch.labels_B, inputs.targets["label"])
        assert batch.ddp_weight == share.row_factor
        if kind == "crop":
            assert torch.equal(batch.mixed_labels_B, batch.labels_B)
            assert torch.equal(batch.lambda_B, torch.ones(len(batch)))
        else:
            assert inputs.lambda_B is not None
            assert torch.equal(batch.mixed_labels_B, inputs.partner_target("label"))
            assert torch.equal(batch.lambda_B, inputs.lambda_B)


def test_targets_are_labels_mixed_like_pixels(replays: Replay, opener: Opener) -> None:
    batch = opener(replays("function_matching"))[0]
    expected = np.zeros((8, 10))
    for row in range(8):
        expected[row, int(batch.labels_B[row])] += float(batch.lambda_B[row])
        expected[row, int(batch.mixed_labels_B[row])] += 1 - float(batch.lambda_B[row])
    np.testing.assert_allclose(batch.targets().numpy(), expected, rtol=0, atol=ulps(2))
    logits_BK = batch.teacher_logits()
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(logits_BK, batch.targets()),
        ce(logits_BK, batch.labels_B, mixed_labels_B=batch.mixed_labels_B, lambda_B=batch.lambda_B),
    )


def test_loader_processes_change_no_batch_of_any_epoch(replays: Replay, opener: Opener) -> None:
    cache = replays("function_matching")
    dataset, alone = opener(cache), opener(cache)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch, start_step in ((0, 0), (1, 3), (NUM_VIEWS + 1, 0)):
        dataset.set_epoch(epoch, start_step=start_step)
        alone.set_epoch(epoch, start_step=start_step)
        assert len(loader) == STEPS - start_step
        assert_same(loader, alone)


@pytest.mark.slow
def test_a_loader_process_that_is_spawned_reads_the_same(replays: Replay, opener: Opener) -> None:
    dataset = opener(replays("function_matching"))
    first = dataset[0]
    with closing(pickle.loads(pickle.dumps(dataset))) as copy:
        assert_same([copy[0]], [first])
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert_same(loader, dataset)


def sampled(sampler: Callable[[CachedDataset], Any]) -> Callable[[CachedDataset], dict[str, Any]]:
    return lambda dataset: {"sampler": sampler(dataset)}


def dealt(rank: int) -> Callable[[CachedDataset], dict[str, Any]]:
    return sampled(lambda dataset: DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=False))  # pyright: ignore[reportArgumentType]


# Arguments of a loader in addition to the dataset.
REORDERED: dict[str, Callable[[CachedDataset], dict[str, Any]]] = {
    "shuffle": lambda _: {"shuffle": True, "generator": torch.Generator().manual_seed(0)},
    "reversed": sampled(lambda dataset: range(len(dataset) - 1, -1, -1)),
    "from the middle": sampled(lambda dataset: range(2, len(dataset))),
    "with replacement": sampled(
        lambda dataset: RandomSampler(dataset, replacement=True, generator=torch.Generator().manual_seed(0))  # pyright: ignore[reportArgumentType]
    ),
    "rank 0 of a distributed sampler": dealt(0),
    "rank 1 of a distributed sampler": dealt(1),
}


@pytest.mark.parametrize(
    ("name", "num_workers"),
    [*((name, 0) for name in REORDERED), ("rank 0 of a distributed sampler", 2)],
)
def test_items_in_another_order_are_refused(replays: Replay, opener: Opener, name: str, num_workers: int) -> None:
    dataset = opener(replays("crop"))
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, **REORDERED[name](dataset))
    with refused(OrderError) as caught:
        list(loader)
    assert caught.value.code == "data.out-of-order"
    assert "use_distributed_sampler=False" in str(caught.value)
    # The dataset itself is as good as before.
    assert [batch.step for batch in DataLoader(dataset, batch_size=None, num_workers=num_workers)] == [*range(STEPS)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_would_batch_the_batches_is_refused(replays: Replay, opener: Opener, num_workers: int) -> None:
    # From a loader process torch brings the type and the text alone.
    with refused(ConfigError, match="batch_size=None") as caught:
        next(iter(DataLoader(opener(replays("crop")), num_workers=num_workers)))
    assert num_workers or caught.value.code == "data.batched-twice"


def test_a_refusal_names_the_item_that_was_next(replays: Replay, opener: Opener) -> None:
    dataset = opener(replays("crop"), epoch=2, start_step=1)
    assert dataset[0].step == 2 * STEPS + 1
    with pytest.raises(OrderError) as caught:
        dataset[2]
    assert (caught.value.where, caught.value.got) == ("epoch 2, from step 1", "item 2 after item 0")
    assert str(caught.value.expected).startswith("item 1:")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_begins_in_the_middle_of_a_pass_is_refused(
    replays: Replay, opener: Opener, num_workers: int
) -> None:
    dataset = opener(replays("crop"))
    options: dict[str, Any] = {"prefetch_factor": 1} if num_workers else {}
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=num_workers, **options))
    next(batches)
    dataset.set_epoch(1)
    with refused(OrderError):
        list(batches)
    del batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_passes_may_stop_early_and_be_looked_at_beforehand(replays: Replay, opener: Opener, num_workers: int) -> None:
    dataset = opener(replays("crop"))
    assert dataset[0].step == dataset[0].step == 0
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0)
    for epoch, num_steps in ((0, 2), (1, 3), (2, STEPS)):
        dataset.set_epoch(epoch)
        steps = [batch.step for batch in islice(loader, num_steps)]
        assert steps == [epoch * STEPS + step for step in range(num_steps)]
    dataset.set_epoch(3)
    assert_same(dataset, dataset)


def test_a_second_pass_at_the_same_epoch_warns_unless_it_is_set_again(replays: Replay, opener: Opener) -> None:
    dataset = opener(replays("crop"), epoch=1)
    loader = DataLoader(dataset, batch_size=None)
    for _ in range(2):
        assert len(list(loader)) == STEPS
        dataset.set_epoch(1)
    list(loader)
    with pytest.warns(UserWarning, match=r"repeats epoch 1(.|\n)*set_epoch"):
        list(loader)


def test_loader_processes_warn_of_a_second_pass_too(replays: Replay, opener: Opener) -> None:
    loader = DataLoader(opener(replays("crop")), batch_size=None, num_workers=2)
    list(loader)
    # Warnings are errors in these tests, also in their loaders' processes, and a loader raises the kind that it caught.
    with refused(UserWarning, match="repeats epoch 0"):
        list(loader)


def test_a_later_start_step_gives_the_rest_of_the_epoch(replays: Replay, opener: Opener) -> None:
    whole = list(opener(replays("crop"), epoch=3))
    rest = opener(replays("crop"), epoch=3, start_step=1)
    for start_step in range(1, STEPS + 1):
        assert len(rest) == STEPS - start_step
        assert_same(rest, whole[start_step:])
        rest.set_epoch(3, start_step=min(start_step + 1, STEPS))


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, {}), (3, {"tail": "drop", "global_batch_size": 34})],
    ids=["two ranks, the last step of three rows", "three ranks of unequal lanes"],
)
@pytest.mark.parametrize("kind", [slow("crop"), "function_matching", slow("everything")])
def test_weighted_losses_of_the_ranks_have_the_global_batchs_mean(
    replays: Replay, opener: Opener, kind: str, world_size: int, options: dict[str, Any]
) -> None:
    whole = opener(replays(kind), **options)
    ranks = [opener(replays(kind), rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert [name for share in shares for name in share.sample_ids] == batch.sample_ids
        assert torch.equal(torch.cat([share.images() for share in shares]), batch.images())
        means = [share.teacher_logits().double().square().mean() * share.ddp_weight for share in shares]
        squares = batch.teacher_logits().double().square()
        # Sums of squares on both sides, in float64.
        error = ulps(2 * squares.numel(), dtype=torch.float64)
        torch.testing.assert_close(torch.stack(means).mean(), squares.mean(), rtol=error, atol=0)


def test_images_come_in_any_size_and_normalisation(replays: Replay, opener: Opener) -> None:
    cache = replays("crop")
    small = opener(cache, size=12, interpolation="bicubic", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))[0].images()
    assert small.shape == (8, 3, 12, 12)
    assert 0 <= float(small.min()) < float(small.max()) <= 1
    batch = opener(cache)[0]
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (cache.config.teacher.mean, cache.config.teacher.std)
    )
    torch.testing.assert_close(batch.images(), (batch.rows.pixels_BCHW / 255 - mean) / std)


def test_several_caches_hold_outputs_for_the_same_images(
    replays: Replay, wide_cache: TinyCache, opener: Opener
) -> None:
    cache = replays("crop")
    both = opener([cache.url, wide_cache.url], size=16)
    datasets = both, opener(cache), opener(wide_cache, size=16)
    for dataset in datasets:
        dataset.set_epoch(1)
    for batch, first, second in zip(*datasets, strict=True):
        assert torch.equal(batch.images(), first.images())
        assert torch.equal(batch.teacher_logits(), first.teacher_logits())
        assert torch.equal(batch.teacher_logits(teacher=1), second.teacher_logits())
    assert both.num_views == NUM_VIEWS - 2
    with raises("config.student-size-unclear"):
        opener([cache.url, wide_cache.url])


def test_class_means_are_those_of_each_teachers_cache(replays: Replay, wide_cache: TinyCache, opener: Opener) -> None:
    caches = [replays("crop"), wide_cache]
    dataset = opener([cache.url for cache in caches], size=16)
    for teacher, cache in enumerate(caches):
        stored = open_cache(cache.url).class_means()
        assert stored is not None
        assert torch.equal(dataset.class_means(teacher=teacher), torch.from_numpy(stored.mean_KD))


def test_a_short_form_of_logits_is_read_at_the_temperatures_that_were_named(
    replays: Replay, opener: Opener, tmp_path: Path
) -> None:
    config = replays("crop").config
    section = cache_section(config).model_copy(update={"url": str(tmp_path / "topk"), "logits": "topk:3"})
    views = config.views.model_copy(update={"count": 1})
    build(config.model_copy(update={"cache": section, "views": views}))
    batch = opener(section.url, temperatures=(1.0, 4.0))[0]
    assert not torch.equal(batch.teacher_logits(temperature=4.0), batch.teacher_logits())
    with raises("cache.logits-not-read") as caught:
        batch.teacher_logits(temperature=2.0)
    assert caught.value.expected == "one of 1, 4"
    with raises("cache.logits-not-read"):
        opener(replays("crop"), temperatures=())[0].teacher_logits()


def test_drift_stops_it_unless_allowed_or_not_looked_for(replay_copy: Replay, opener: Opener) -> None:
    cache = replay_copy("crop")
    rewrite_view(cache, "digits-00", 0, set_cell("pixel_digest", 0, bytes(16)))
    with raises("cache.pixel-drift"):
        opener(cache)
    assert len(opener(cache, verify_canaries=False)) == STEPS
    with pytest.warns(UserWarning, match="1 of 2 canaries differ, block means by up to 0 of 255"):
        opener(cache, allow_pixel_drift=1)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no rows a step": ({"global_batch_size": 0}, "global_batch_size"),
    "an unknown order": ({"order": "random"}, "train.order"),
    "a size of nothing": ({"size": 0}, "student.size"),
    "a rank beyond the world": ({"rank": 2, "world_size": 2}, "data.no-such-rank"),
    "more ranks than lanes": ({"rank": 0, "world_size": 9}, "train.more-ranks-than-lanes"),
    "ranks without rows": ({"rank": 0, "world_size": 8}, "train.batch-too-small"),
    "an epoch before the first": ({"epoch": -1}, "data.no-such-step"),
    "a step beyond the epoch": ({"start_step": STEPS + 1}, "data.no-such-step"),
    "a temperature of 0": ({"temperatures": (0.0,)}, "data.bad-temperature"),
    "a large dropped tail": ({"tail": "drop"}, "train.too-many-dropped"),
    "shards that the cache lacks": ({"shards": "/nowhere/other-{0..1}.tar"}, "cache.missing-shards"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_wrong_option_is_refused(replays: Replay, opener: Opener, name: str) -> None:
    options, reported = BAD_OPTIONS[name]
    with pytest.raises((ConfigError, CacheError), match=reported):
        opener(replays("crop"), **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_is_not_the_cached_one_gives_no_batch(
    replays: Replay, opener: Opener, tmp_path: Path, num_workers: int
) -> None:
    paths: list[Path] = []
    for url in shard_urls(replays("crop").config).values():
        tar = bytearray(Path(url).read_bytes())
        tar[tar.rindex(b"IDAT") + 20] ^= 1
        paths.append(tmp_path / Path(url).name)
        paths[-1].write_bytes(tar)
    dataset = opener(Path(replays("crop").url), shards=paths)
    with refused(CacheError, match=r"shard\.image-changed"):
        list(DataLoader(dataset, batch_size=None, num_workers=num_workers))


def test_no_cache_is_refused(replays: Replay, opener: Opener, tmp_path: Path) -> None:
    with raises("cache.missing"):
        opener(tmp_path)
    # A run has a copy of the manifest of its cache.
    (tmp_path / "manifest.json").write_bytes((Path(replays("crop").url) / "manifest.json").read_bytes())
    with raises("cache.missing"):
        opener(tmp_path)
    with raises("config.missing-key"):
        opener([])


def test_missing_labels_and_class_means_are_refused_where_they_are_required(
    replays: Replay, opener: Opener, tmp_path: Path
) -> None:
    config = replays("crop").config
    section = cache_section(config).model_copy(update={"url": str(tmp_path / "cache"), "class_means": "none"})
    data, views = config.data.model_copy(update={"label": None}), config.views.model_copy(update={"count": 1})
    build(config.model_copy(update={"cache": section, "data": data, "views": views}))
    batch = opener(section.url)[0]
    assert batch.labels_B.tolist() == [-1] * 8
    assert not batch.targets().any()
    with raises("data.no-labels"):
        opener(section.url, require_labels=True)
    with raises("cache.no-class-means") as caught:
        opener(section.url).class_means()
    assert "cache.class_means=eval" in str(caught.value)


def test_the_text_of_a_batch_is_short_and_has_every_shape(replays: Replay, opener: Opener) -> None:
    text = repr(opener(replays("function_matching"))[0])
    assert "\n" not in text
    assert len(text) < 600
    for part in (
        "CachedBatch(rows=Batch(step=0, epoch=0, num_rows_global=8",
        "pixels_BCHW=uint8[8,3,16,16]",
        "targets={'label': int64[8]}",
        "lambda_B=float32[8]",
        "teacher_outputs=[TeacherOutputs(tensors={('logits', None): float32[8,10]}, norm_B=float32[8])]",
        "… 8 in all]",
        "mean_C=float32[3]",
        "ddp_weight=1.0)",
    ):
        assert part in text


def test_the_public_classes_are_also_at_their_former_place() -> None:
    assert (former.CachedDataset, former.CachedBatch) == (CachedDataset, CachedBatch)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        former.Nothing  # noqa: B018
