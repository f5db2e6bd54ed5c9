"""``data.num_views``: a student is trained on the first views of a cache as on a cache of these views alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cache.read.reader import open_cache
from pipeline.student.run import checkpoint
from pipeline.student.training.config_checks import check_config, check_distillation
from pipeline.student.training.trainer import train
from schemas.config import Config
from stillroom import CachedDataset
from tests.errors import raises
from tests.pipeline.caches import TinyCache, cache_section
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.runs import cached_source, metrics, run_config


def losses(url: Path) -> list[float]:
    return [record["loss"] for record in metrics(url)]


def with_num_views(cache: TinyCache, num_views: int | None, url: Path, **sections: Any) -> Config:
    return run_config(cache.config, url, data={"num_views": num_views}, **sections)


def test_the_first_views_of_a_cache_train_as_a_cache_of_these_views_does(replays: Replay, tmp_path: Path) -> None:
    epochs = {"train": {"epochs": 3}}
    small = train(with_num_views(replays("crop", num_views=2), None, tmp_path / "small", **epochs))
    first = train(with_num_views(replays("crop"), 2, tmp_path / "first", **epochs))
    assert losses(tmp_path / "first") == losses(tmp_path / "small")
    assert (first["num_views"], first["num_cached_views"]) == (2, NUM_VIEWS)
    assert "num_views" not in small


def test_a_run_continues_with_the_same_views_alone(replays: Replay, tmp_path: Path) -> None:
    checkpoint.claim_run(str(tmp_path), with_num_views(replays("crop"), 2, tmp_path))
    with raises("run.other-config", got="data.num_views: 2 -> 3"):
        checkpoint.check_same_config(str(tmp_path), with_num_views(replays("crop"), 3, tmp_path))


@pytest.mark.parametrize("num_views", [1, NUM_VIEWS])
def test_one_view_and_all_views_are_the_limits(replays: Replay, num_views: int) -> None:
    cache = replays("crop")
    source = cached_source(cache, data=cache.config.data.model_copy(update={"num_views": num_views}))
    assert [source.view_of(epoch) for epoch in range(2 * NUM_VIEWS)] == [
        epoch % num_views for epoch in range(2 * NUM_VIEWS)
    ]


def test_more_views_than_a_cache_has_are_refused(replays: Replay, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"got": NUM_VIEWS + 1, "expected": f"1 to {NUM_VIEWS}"}
    with raises("config.num-views", **fields):
        train(with_num_views(replays("crop"), NUM_VIEWS + 1, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with raises("config.num-views", **fields):
        CachedDataset(replays("crop").url, num_views=NUM_VIEWS + 1)


def test_of_several_caches_the_one_with_the_fewest_views_is_the_limit(replays: Replay, wide_caches: Replay) -> None:
    urls = [replays("crop").url, wide_caches("crop").url]
    with raises("config.num-views", expected=f"1 to {NUM_VIEWS - 2}"):
        CachedDataset(urls, num_views=NUM_VIEWS - 1)


def test_it_is_refused_before_a_cache_with_fewer_views_is_built(replays: Replay, tmp_path: Path) -> None:
    config = with_num_views(replays("crop"), NUM_VIEWS + 1, tmp_path / "run")
    url = str(tmp_path / "to-build")
    section = cache_section(replays("crop").config).model_copy(update={"url": url})
    data = config.data.model_copy(update={"cache": url})
    with raises("config.num-views", expected=f"1 to {NUM_VIEWS}"):
        check_distillation(config.model_copy(update={"cache": section, "data": data}))


@pytest.mark.parametrize("mode", ["online", "none"])
def test_it_is_refused_without_a_cache(replays: Replay, tmp_path: Path, mode: str) -> None:
    loss = [{"name": "ce"}] if mode == "none" else [{"name": "kd", "temperature": 1.0}]
    config = run_config(replays("crop").config, tmp_path, mode=mode, loss=loss, data={"num_views": 2})
    with raises("config.num-views", where="data.num_views"):
        check_config(config)


def test_a_dataset_shows_the_first_views_alone(replays: Replay) -> None:
    url, opened = replays("crop").url, open_cache(replays("crop").url)
    with closing(CachedDataset(url, epoch=3, global_batch_size=20, tail="short", num_views=2)) as dataset:
        batch = dataset[0]
        assert dataset.num_views == 2
    # Epoch 3 shows view 1.
    stored = {
        sample: row
        for shard in opened.shards
        for sample, row in zip(
            opened.index(shard).sample_ids(opened.index(shard).ok),
            opened.view(shard.shard_id, 1).decoded("logits"),
            strict=True,
        )
    }
    expected = torch.stack([torch.from_numpy(stored[sample]) for sample in batch.sample_ids])
    assert torch.equal(batch.teacher_logits(), expected)
