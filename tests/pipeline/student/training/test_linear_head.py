"""Logits computed from stored embeddings reach the losses, and those of an online teacher are equal."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.cache.read.reader import open_cache
from pipeline.student.cached_dataset import CachedDataset
from pipeline.student.distributed import DistributedContext
from pipeline.student.training.setup import prepare
from schemas.config import Config
from tests.pipeline.caches import TinyCache, build, cache_section
from tests.pipeline.student.runs import NORMALISED, index_shards, losses, run, run_config, training_error

KD_AND_COSINE = [{"name": "kd", "temperature": 2.0}, {"name": "cosine"}]


@pytest.fixture(scope="module")
def heads(built_cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Configs of built caches by the encoding of the embedding. Never written to."""
    configs: dict[str, Config] = {}
    for kind in ("fp32", "int8"):
        keys = {"logits": "head", "embeddings": kind, "url": str(tmp_path_factory.mktemp("head") / kind)}
        cache = cache_section(built_cache.config).model_copy(update=keys)
        configs[kind] = built_cache.config.model_copy(update={"cache": cache})
        build(configs[kind])
    return configs


def config_of(base: Config, url: Path, mode: str, **sections: Any) -> Config:
    cache = cache_section(base).model_dump(include={"url", "logits", "embeddings"}) if mode == "online" else {}
    extra = {"cache": cache} if cache else {}
    return run_config(base, url, mode=mode, student=NORMALISED, **extra, **sections)


def test_parity_of_a_cached_and_an_online_run(heads: dict[str, Config], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"loss": KD_AND_COSINE, "train": {"epochs": 3, "optimizer": "sgd", "lr": 0.02}}
    for mode in ("cache", "online"):
        run(config_of(heads["fp32"], tmp_path / mode, mode, **keys))
    cached, online = losses(tmp_path / "cache"), losses(tmp_path / "online")
    assert len(cached) == 15
    assert cached == pytest.approx(online, rel=training_error(config_of(heads["fp32"], tmp_path, "cache", **keys), 15))


def teacher_logits(config: Config, *, with_head: bool) -> NDArray[np.float32]:
    """[B,K] of the first step, as the losses see them."""
    setup = prepare(config, DistributedContext())
    try:
        batch = setup.dataset[0]
        if batch.teacher_outputs:
            logits_BK = batch.teacher_outputs[0].at("logits")
        else:
            (teacher,), (head,) = setup.supervision.teachers, setup.supervision.heads
            outputs = teacher.forward(batch.pixels_BCHW, batch.partner_B, batch.lambda_B, batch.cutmix_box_B4)
            assert head is not None
            logits_BK = head.logits_of_exact(outputs["embedding"]) if with_head else outputs["logits"]
        assert logits_BK is not None
        return logits_BK.numpy()
    finally:
        setup.close()


def test_an_online_teacher_rounds_its_embedding_as_the_cache_does(heads: dict[str, Config], tmp_path: Path) -> None:
    index_shards(heads["int8"], tmp_path / "run" / "index")
    cached_BK, online_BK, exact_BK = (
        teacher_logits(config_of(heads["int8"], tmp_path / "run", mode), with_head=with_head)
        for mode, with_head in (("cache", True), ("online", True), ("online", False))
    )
    # Most rows have the same codes, and then the same bits but for the order of a sum; a code may differ where the
    # embedding, computed in another batch, lies between two steps.
    off_B, rounding_B = (np.abs(cached_BK - values_BK).max(1) for values_BK in (online_BK, exact_BK))
    assert np.median(off_B) < 1e-6 < 1e-5 < np.median(rounding_B)


def test_a_student_is_trained_online_on_the_rounded_logits(heads: dict[str, Config], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"train": {"epochs": 1, "lr": 1e-3}}
    runs = {
        "cache": config_of(heads["int8"], tmp_path / "cache", "cache", **keys),
        "head": config_of(heads["int8"], tmp_path / "head", "online", **keys),
        "exact": run_config(heads["int8"], tmp_path / "exact", mode="online", student=NORMALISED, **keys),
    }
    for config in runs.values():
        run(config)
    cached, head, exact = (np.array(losses(tmp_path / name)) for name in runs)
    assert np.median(np.abs(cached / head - 1)) < np.median(np.abs(cached / exact - 1)) / 10


def test_a_dataset_has_the_logits_without_being_asked_for_embeddings(heads: dict[str, Config]) -> None:
    config = heads["int8"]
    url = cache_section(config).url
    cache = open_cache(url)
    by_id = {
        sample_id: (shard, row)
        for shard in cache.shards
        for row, sample_id in enumerate(cache.index(shard).sample_ids(cache.index(shard).ok))
    }
    with closing(CachedDataset(url, global_batch_size=8, tail="short")) as dataset:
        batch = dataset[0]
    places = [by_id[sample_id] for sample_id in batch.sample_ids]
    expected = [cache.view(shard.shard_id, 0).decoded("logits")[row] for shard, row in places]
    got_BK = batch.teacher_logits(temperature=3.0)
    torch.testing.assert_close(got_BK, torch.tensor(np.array(expected)), rtol=0, atol=1e-6)
