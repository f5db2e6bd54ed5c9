"""Micro-batches: every row once, partners together, and the gradients of the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.shards.writer import pack_shards
from pipeline.student.training.micro_batches import micro_batches, num_micro_batches, smallest_micro_batch, split_rows
from pipeline.student.training.trainer import train
from tests.marks import slow
from tests.pipeline.caches import digit_samples
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import (
    CE,
    KD,
    assert_weights_close,
    cached_source,
    dataset,
    index_shards,
    metrics,
    run_config,
    state_of,
    training_error,
)


@given(st.integers(0, 200), st.integers(1, 20), st.sampled_from([1, 2]))
def test_slices_cover_all_rows_in_order_at_even_positions_and_in_sizes_that_differ_by_a_unit(
    num_rows: int, chunks: int, rows_per_unit: int
) -> None:
    found = split_rows(num_rows, chunks, rows_per_unit=rows_per_unit)
    assert [row for chunk in found for row in range(chunk.start, chunk.stop)] == list(range(num_rows))
    assert all(chunk.start % rows_per_unit == 0 for chunk in found[:-1] if chunk.stop > chunk.start)
    sizes = [chunk.stop - chunk.start for chunk in found]
    assert len(sizes) == chunks
    assert max(sizes) - min(sizes) <= 2 * rows_per_unit - 1
    assert smallest_micro_batch(num_rows, chunks, rows_per_unit=rows_per_unit) == min(sizes)


@given(st.integers(1, 20), st.integers(1, 300), st.data())
def test_a_short_step_has_no_larger_micro_batches_than_a_full_one(
    accumulate: int, size: int, data: st.DataObject
) -> None:
    num_rows = data.draw(st.integers(1, size))
    chunks = num_micro_batches(accumulate, num_rows, size)
    assert 1 <= chunks <= accumulate
    assert num_micro_batches(accumulate, size, size) == accumulate
    assert num_rows / chunks <= size / accumulate


@pytest.mark.slow
def test_micro_batches_hold_the_rows_of_the_batch_and_partners_stay_together(replays: Replay) -> None:
    cache = replays("everything")
    source = cached_source(cache)
    batch = dataset(source, cache.config.views)[4]
    assert len(batch.sample_ids) == 3, "the short last step: a pair, or two that are not mixed, and a single row"
    for whole in (dataset(source, cache.config.views)[1], batch):
        chunks = micro_batches(whole, 2)
        assert [one for chunk in chunks for one in chunk.sample_ids] == whole.sample_ids
        assert whole.partner_B is not None
        for name in ("pixels_BCHW", "lambda_B", "cutmix_box_B4"):
            assert torch.equal(torch.cat([getattr(chunk, name) for chunk in chunks]), getattr(whole, name))
        assert torch.equal(torch.cat([chunk.targets["label"] for chunk in chunks]), whole.targets["label"])
        logits = [chunk.teacher_outputs[0].at("logits") for chunk in chunks]
        assert torch.equal(torch.cat([one for one in logits if one is not None]), whole.teacher_outputs[0].at("logits"))
        partners = [chunk.sample_ids[row] for chunk in chunks for row in chunk.partner_B.tolist()]
        assert partners == [whole.sample_ids[row] for row in whole.partner_B.tolist()]
        assert {chunk.num_rows_global for chunk in chunks} == {whole.num_rows_global}


@pytest.mark.parametrize("kind", ["crop", "function_matching"])
@pytest.mark.parametrize("chunks", [slow(2), 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    replays: Replay, tmp_path: Path, kind: str, chunks: int
) -> None:
    """Plain SGD of a student without BatchNorm: weights differ as gradients do. Batches of 16 in chunks of 4 to 8 rows,
    and a last one of 3 in fewer."""
    base = replays(kind).config
    keys = {"epochs": 2, "global_batch_size": 16, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1}
    for accumulate in (1, chunks):
        config = {"loss": [*CE, *KD], "train": {**keys, "accumulate": accumulate}}
        train(run_config(base, tmp_path / str(accumulate), **config))
    whole, accumulated = (metrics(tmp_path / str(accumulate)) for accumulate in (1, chunks))
    error = training_error(run_config(base, tmp_path, train=keys), len(whole))
    for name in ("loss", "loss/ce", "loss/kd"):
        expected = [record[name] for record in whole]
        assert [record[name] for record in accumulated] == pytest.approx(expected, rel=error)
    weights, expected_weights = (state_of(tmp_path / str(accumulate))["model"] for accumulate in (chunks, 1))
    assert_weights_close(weights, expected_weights, error)


def test_a_mean_over_labelled_rows_is_that_of_the_step_and_not_of_its_micro_batches(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    """Every third row has a label, so that chunks of two rows have none, one, or rarely two."""
    samples = (
        (key, {name: data for name, data in members.items() if name == "png" or row % 3 == 0})
        for row, (key, members) in enumerate(digit_samples(35))
    )
    shards = pack_shards(samples, f"{tmp_path}/few-%02d.tar", shard_size=20)
    base = tiny_config(data={"shards": shards, "missing_labels": "ignore"}, views={"kind": "crop"})
    curves: list[list[float]] = []
    for accumulate in (1, 4):
        keys = {"epochs": 2, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "accumulate": accumulate}
        url = tmp_path / str(accumulate)
        config = run_config(base, url, mode="none", loss=CE, train=keys)
        index_shards(config, url / "index")
        train(config)
        curves.append([record["loss"] for record in metrics(url)])
    assert curves[1] == pytest.approx(curves[0], rel=training_error(config, len(curves[0])))
