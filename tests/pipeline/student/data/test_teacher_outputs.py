"""Teacher outputs stay encoded until their rows are read, and are decoded at the temperatures of the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipeline.cache.format import codec
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import open_cache
from pipeline.student.distributed import DistributedContext
from pipeline.student.training.config_checks import check_training
from pipeline.student.training.setup import prepare
from pipeline.student.training.trainer import train
from schemas.cache_format import Output
from tests.errors import raises
from tests.pipeline.caches import TinyCache
from tests.pipeline.conftest import build_tiny
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import CE, KD, cached_source, dataset, evaluated, metrics, run_config

ND = [{"name": "nd"}]
TWO_TEMPERATURES = [{"name": "kd", "temperature": 1.0}, {"name": "kd", "temperature": 4.0}]
ALL = np.arange(20, dtype=np.int32)


def built(shards: list[str], folder: Path, **cache: Any) -> TinyCache:
    url = str(folder / "cache")
    return build_tiny(shards, url, {"views": {"kind": "crop", "count": 2}, "cache": cache})


@pytest.fixture(scope="module")
def topk(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """Of the three largest logits of each row, whose decoding depends on the temperature; and fp16 embeddings."""
    return built(digits_shards, tmp_path_factory.mktemp("topk"), logits="topk:3", embeddings="fp16")


@pytest.fixture(scope="module")
def without_outputs(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """Of norms and class means alone."""
    return built(digits_shards, tmp_path_factory.mktemp("means"), logits="none", embeddings="none", class_means="eval")


def test_rows_stay_encoded_until_the_batch_decodes_them_at_their_positions(topk: TinyCache) -> None:
    cache = open_cache(topk.url)
    source = cached_source(topk, reads={"logits": (0.5, 4.0), "embedding": (1.0,)})
    sizes = {name: values.nbytes for name, values in source.rows(0, ALL, 1).teachers[0].items()}
    logits_bytes = cache.view("digits-00", 1).outputs["logits"].column.nbytes
    assert sizes == {"norm": 20 * 4, "logits": logits_bytes, "embedding": 20 * 7 * 2}
    assert logits_bytes < 20 * 10 * 2
    batch = dataset(source, topk.config.views)[0]
    (outputs,) = batch.teacher_outputs
    embedding_BD = outputs.at("embedding")
    assert embedding_BD is not None
    assert len({sample_id.partition("/")[0] for sample_id in batch.sample_ids}) == 2
    for position, sample_id in enumerate(batch.sample_ids):
        shard, _, key = sample_id.partition("/")
        row = cache.index(cache.shards[int(shard[-1])]).keys.to_pylist().index(key)
        stored = cache.view(shard, 0)
        np.testing.assert_array_equal(embedding_BD[position], stored.decoded("embedding")[row])
        assert outputs.norm_B[position] == stored.embedding_norm_N[row]
        logits = stored.outputs["logits"]
        for temperature in (0.5, 4.0):
            expected_NK = codec.decode(logits.column, logits.output, temperature=temperature)
            np.testing.assert_array_equal(outputs.tensors["logits", temperature][position], expected_NK[row])


def test_only_the_rows_of_a_batch_are_decoded_and_once_for_each_temperature(
    topk: TinyCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, float]] = []

    def decode(column: pa.Array, output: Output, *, temperature: float = 1.0, head: None) -> NDArray[np.float32]:
        calls.append((len(column), temperature))
        return codec.decode(column, output, temperature=temperature, head=head)

    monkeypatch.setattr("pipeline.cache.read.reader.decode", decode)
    source = cached_source(topk, reads={"logits": (1.0, 4.0)})
    (outputs,) = dataset(source, topk.config.views)[0].teacher_outputs
    assert sorted(calls) == [(8, 1.0), (8, 4.0)]
    assert set(outputs.tensors) == {("logits", 1.0), ("logits", 4.0)}
    assert not np.array_equal(outputs.tensors["logits", 1.0], outputs.tensors["logits", 4.0])


def test_an_encoding_that_is_the_same_at_any_temperature_is_decoded_once(replays: Replay) -> None:
    cache = replays("crop")
    source = cached_source(cache, reads={"logits": (1.0, 4.0)})
    (outputs,) = dataset(source, cache.config.views)[0].teacher_outputs
    assert list(outputs.tensors) == [("logits", None)]
    assert outputs.at("logits", 1.0) is outputs.at("logits", 4.0) is outputs.tensors["logits", None]


def test_outputs_that_no_loss_reads_are_neither_gathered_nor_decoded(replays: Replay, tmp_path: Path) -> None:
    setup = prepare(run_config(replays("crop").config, tmp_path, loss=[*CE, *ND]), DistributedContext())
    (outputs,) = setup.dataset[0].teacher_outputs
    assert (outputs.tensors, len(outputs.norm_B)) == ({}, 8)
    assert [*setup.supervision.source.rows(0, ALL, 0).teachers[0]] == ["norm"]
    setup.close()


def test_each_term_of_a_training_reads_logits_of_its_temperature(topk: TinyCache, tmp_path: Path) -> None:
    """Before the first step the student is the same, so each term is what it is alone."""

    def first_step(name: str, loss: list[dict[str, Any]]) -> dict[str, float]:
        train(run_config(topk.config, tmp_path / name, loss=loss, train={"epochs": 1}))
        return metrics(tmp_path / name)[0]

    both = first_step("both", TWO_TEMPERATURES)
    alone = [first_step(str(term["temperature"]), [term])["loss/kd"] for term in TWO_TEMPERATURES]
    assert [both["loss/kd"], both["loss/kd_2"]] == alone


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        (KD, "logits"),
        ([{"name": "dist"}], "logits"),
        ([*CE, *ND, *KD], "logits"),
        ([{"name": "cosine"}], "embeddings"),
        ([*CE, {"name": "mse"}], "embeddings"),
    ],
    ids=str,
)
def test_a_loss_is_refused_before_any_work_where_the_cache_lacks_what_it_reads(
    without_outputs: TinyCache, tmp_path: Path, loss: list[dict[str, Any]], key: str
) -> None:
    config = run_config(without_outputs.config, tmp_path / "run", loss=loss)
    for refuse in (train, check_training):
        with raises(f"cache.no-{key}", where=without_outputs.url) as caught:
            refuse(config)
        assert f"cache.{key}=fp16" in str(caught.value.next_step)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nd_trains_from_norms_and_class_means_alone(without_outputs: TinyCache, tmp_path: Path) -> None:
    data = {"val_shards": without_outputs.config.data.shards}
    config = run_config(without_outputs.config, tmp_path, loss=ND, train={"epochs": 12, "lr": 0.02}, data=data)
    train(config)
    curve = [record["loss"] for record in metrics(tmp_path)]
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    evaluation = evaluated(config)
    assert evaluation.metrics["teacher_top1"] is not None
    assert not evaluation.head_trained
    assert [evaluation.metrics[name] for name in ("top1", "agreement", "kl")] == [None] * 3
    assert inspect_cache(without_outputs.url).outputs == {}
