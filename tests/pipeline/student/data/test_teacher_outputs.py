"""Teacher outputs stay encoded until their rows are read, and are decoded at the temperatures of the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.cache.format import codec
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import ConfigError
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.training.config_checks import check_distillation, check_training
from pipeline.student.training.trainer import train
from schemas.cache_format import Output
from schemas.config import Config
from tests.pipeline.caches import TinyCache, build
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import CE, KD, cached_source, dataset, metrics, run_config

ND = [{"name": "nd"}]
TWO_TEMPERATURES = [{"name": "kd", "temperature": 1.0}, {"name": "kd", "temperature": 4.0}]
ALL = np.arange(20, dtype=np.int32)
Decoded = list[tuple[int, float]]


def built(tiny_config: TinyConfig, **cache: Any) -> TinyCache:
    config = tiny_config(views={"kind": "crop", "count": 2}, cache=cache)
    build(config)
    assert config.cache is not None
    return TinyCache(config.cache.url, config)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    """(rows, temperature) of every decoding from here on, of an encoding that gives ``(1 + T)`` times what is stored:
    meaningless, but a wrong temperature changes it."""
    calls: Decoded = []

    def stand_in(column: pa.Array, output: Output, *, temperature: float = 1.0) -> NDArray[np.float32]:
        calls.append((len(column), temperature))
        return codec.decode(column, output) * np.float32(1 + temperature)

    monkeypatch.setattr("pipeline.cache.read.reader.decode", stand_in)
    monkeypatch.setattr("pipeline.cache.read.reader.depends_on_temperature", lambda _: True)
    return calls


@pytest.mark.parametrize(("encoding", "row_bytes"), [("fp32", 40), ("fp16", 20)])
def test_a_row_costs_its_stored_bytes(tiny_config: TinyConfig, encoding: str, row_bytes: int) -> None:
    cache = built(tiny_config, logits=encoding, embeddings="fp16")
    columns = open_cache(cache.url).view("digits-00", 1)
    assert columns.outputs["logits"].column.nbytes == 20 * row_bytes
    assert columns.outputs["embedding"].column.nbytes == 20 * 7 * 2
    columns = cached_source(cache).rows(0, ALL, 1).of_teacher(0)
    assert {name: values.nbytes for name, values in columns.items()} == {"norm": 20 * 4, "logits": 20 * row_bytes}


def test_embeddings_stay_encoded_where_a_loss_reads_them(tiny_config: TinyConfig) -> None:
    cache = built(tiny_config, embeddings="fp16")
    source = cached_source(cache, with_embeddings=True)
    assert source.rows(0, ALL, 1).of_teacher(0)["embedding"].nbytes == 20 * 7 * 2
    batch = dataset(source, cache.config.views)[0]
    for place, sample_id in enumerate(batch.sample_ids):
        shard, _, key = sample_id.partition("/")
        index = open_cache(cache.url).index(source.caches[0].shards[int(shard[-1])])
        stored = open_cache(cache.url).view(shard, 0).embedding_ND
        assert stored is not None
        assert batch.teacher_outputs[0].embedding_BD is not None
        np.testing.assert_array_equal(
            batch.teacher_outputs[0].embedding_BD[place], stored[index.keys.to_pylist().index(key)]
        )


def test_without_such_a_loss_a_batch_carries_no_embeddings(replays: Replay) -> None:
    cache = replays("crop")
    assert dataset(cached_source(cache), cache.config.views)[0].teacher_outputs[0].embedding_BD is None


def test_only_the_rows_of_a_batch_are_decoded_and_once_for_each_temperature(replays: Replay, decoded: Decoded) -> None:
    cache = replays("crop")
    batches = dataset(cached_source(cache), cache.config.views, temperatures=(1.0, 4.0))
    batch = batches[0]
    assert sum(rows for rows, temperature in decoded if temperature == 1) == 8
    assert sum(rows for rows, temperature in decoded if temperature == 4) == 8
    assert {temperature for _, temperature in decoded} == {1.0, 4.0}
    assert set(batch.teacher_outputs[0].logits) == {1.0, 4.0}


@pytest.mark.usefixtures("decoded")
def test_rows_of_several_shards_come_at_their_places(replays: Replay) -> None:
    cache = replays("crop")
    source = cached_source(cache)
    batch = dataset(source, cache.config.views, temperatures=(0.5, 4.0))[0]
    assert len({name.partition("/")[0] for name in batch.sample_ids}) == 2
    for place, sample_id in enumerate(batch.sample_ids):
        shard, _, key = sample_id.partition("/")
        row = open_cache(cache.url).index(source.caches[0].shards[int(shard[-1])]).keys.to_pylist().index(key)
        stored = open_cache(cache.url).view(shard, 0)
        logits = stored.outputs["logits"]
        exact = codec.decode(logits.column, logits.output)[row]
        for temperature, factor in ((0.5, 1.5), (4.0, 5.0)):
            logits_BK = batch.teacher_outputs[0].logits_at(temperature)
            assert logits_BK is not None
            np.testing.assert_array_equal(logits_BK[place], exact * np.float32(factor))
        assert batch.teacher_outputs[0].norm_B[place] == stored.embedding_norm_N[row]


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 4.0)])
def test_an_encoding_that_is_the_same_at_any_temperature_is_decoded_once(
    replays: Replay, temperatures: tuple[float, ...]
) -> None:
    cache = replays("crop")
    (outputs,) = dataset(cached_source(cache), cache.config.views, temperatures=temperatures)[0].teacher_outputs
    assert list(outputs.logits) == [None]
    assert all(outputs.logits_at(temperature) is outputs.logits[None] for temperature in temperatures)


def test_logits_that_no_loss_reads_are_not_decoded(replays: Replay, tmp_path: Path, decoded: Decoded) -> None:
    config = run_config(replays("crop").config, tmp_path, loss=[*CE, *ND])
    train(config)
    assert decoded == []
    assert len(metrics(tmp_path)) == 10


def first_step(cache: TinyCache, url: Path, loss: list[dict[str, Any]]) -> dict[str, float]:
    train(run_config(cache.config, url, loss=loss, train={"epochs": 1}))
    return metrics(url)[0]


def check_each_term_reads_its_own(cache: TinyCache, folder: Path) -> dict[str, float]:
    """Before the first step the student is the same, so each term is what it is alone."""
    found = first_step(cache, folder / "both", TWO_TEMPERATURES)
    for key, term in zip(("loss/kd", "loss/kd_2"), TWO_TEMPERATURES, strict=True):
        assert found[key] == first_step(cache, folder / key, [term])["loss/kd"]
    return found


def test_each_term_of_a_training_reads_logits_of_its_temperature(
    replays: Replay, tmp_path: Path, decoded: Decoded
) -> None:
    found = check_each_term_reads_its_own(replays("crop"), tmp_path)
    assert found["loss/kd"] != pytest.approx(found["loss/kd_2"], rel=1e-3)
    assert {temperature for _, temperature in decoded} == {1.0, 4.0}


def test_loader_processes_decode_for_the_same_temperatures(replays: Replay, tmp_path: Path, decoded: Decoded) -> None:
    cache = replays("crop")
    for workers in (0, 2):
        train(run_config(cache.config, tmp_path / str(workers), loss=TWO_TEMPERATURES, train={"num_workers": workers}))
    assert metrics(tmp_path / "0") == metrics(tmp_path / "2")
    assert decoded


def test_a_cache_of_the_largest_logits_trains_at_two_temperatures(tiny_config: TinyConfig, tmp_path: Path) -> None:
    try:
        cache = built(tiny_config, logits="topk:4")
    except ValidationError:
        pytest.skip("this version has no encoding topk")
    check_each_term_reads_its_own(cache, tmp_path)
    (outputs,) = dataset(cached_source(cache), cache.config.views, temperatures=(1.0, 4.0))[0].teacher_outputs
    assert set(outputs.logits) == {1.0, 4.0}
    assert not np.array_equal(outputs.logits[1.0], outputs.logits[4.0])


def without_logits(tiny_config: TinyConfig) -> TinyCache:
    return built(tiny_config, logits="none", embeddings="none", class_means="eval")


@pytest.mark.parametrize("loss", [KD, [{"name": "dist"}], [*CE, *ND, *KD]], ids=["kd", "dist", "among others"])
def test_a_loss_that_needs_logits_is_refused_before_any_work_where_there_are_none(
    tiny_config: TinyConfig, tmp_path: Path, loss: list[dict[str, Any]]
) -> None:
    cache = without_logits(tiny_config)
    config = run_config(cache.config, tmp_path / "run", loss=loss)
    for refuse in (train, check_training):
        with pytest.raises(ConfigError) as caught:
            refuse(config)
        assert (caught.value.code, caught.value.where) == ("cache.no-logits", cache.url)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", [[{"name": "cosine"}], [*KD, {"name": "mse"}]], ids=["cosine", "mse"])
def test_a_loss_that_needs_embeddings_is_refused_before_any_work_where_there_are_none(
    tiny_config: TinyConfig, tmp_path: Path, loss: list[dict[str, Any]]
) -> None:
    cache = built(tiny_config, embeddings="none")
    config = run_config(cache.config, tmp_path / "run", loss=loss)
    for refuse in (train, check_training):
        with pytest.raises(ConfigError) as caught:
            refuse(config)
        assert (caught.value.code, caught.value.where) == ("cache.no-embeddings", cache.url)
        assert "cache.embeddings=fp16" in str(caught.value.next_step)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nd_trains_from_norms_and_class_means_alone(tiny_config: TinyConfig, tmp_path: Path) -> None:
    cache = without_logits(tiny_config)
    shards = cache.config.data.shards
    config = run_config(cache.config, tmp_path, loss=ND, train={"epochs": 12, "lr": 0.02}, data={"val_shards": shards})
    train(config)
    curve = [record["loss"] for record in metrics(tmp_path)]
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    assert shards is not None
    found = evaluate_run(
        str(tmp_path), shards, checkpoint_name="last", num_threads=1, device=DistributedContext().device
    )
    assert found.metrics["teacher_top1"] is not None
    assert (found.head_trained, found.metrics["top1"], found.metrics["agreement"], found.metrics["kl"]) == (
        False,
        None,
        None,
        None,
    )
    assert inspect_cache(cache.url).outputs == {}


def test_a_cache_to_be_built_without_the_logits_that_a_loss_needs_is_refused(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    def distilling(loss: list[dict[str, Any]]) -> Config:
        base = tiny_config(cache={"logits": "none"})
        return run_config(base, tmp_path / "run", loss=loss, cache=base.model_dump(mode="json")["cache"])

    with pytest.raises(ConfigError) as caught:
        check_distillation(distilling(KD))
    assert caught.value.code == "cache.no-logits"
    check_distillation(distilling(ND))
