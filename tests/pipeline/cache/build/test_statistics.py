"""The fidelity that a build measures of its encodings, against SciPy and against the stored rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import pearsonr

from pipeline.augment.params import sample_keys
from pipeline.cache.build.statistics import (
    StatisticsFold,
    StatisticsSum,
    cosine_sum,
    kl_sum,
    mean_fidelity,
    pearson_sum,
)
from pipeline.cache.format.codec import RowIdentity, decode, encode, stored_outputs
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import open_cache
from pipeline.shards.index import index_settings
from pipeline.tasks import OutputSpec, task_of
from pipeline.tasks.classification import Classification
from schemas.cache_format import Header, Statistics
from schemas.config import DataConfig
from tests.pipeline.caches import TinyCache, open_built, read_commits
from tests.pipeline.conftest import TinyConfig
from tests.tolerances import ulps

RANDOM = np.random.default_rng(0)
EXACT = RANDOM.normal(0, 3, (6, 11)).astype(np.float32)
STORED = EXACT + RANDOM.normal(0, 0.5, (6, 11)).astype(np.float32)


def rounding(num_rows: int, num_columns: int) -> float:
    """Of a sum over rows, on both sides in float64. A row takes a softmax, means, and three sums of as many products as
    it has columns; logarithms and differences of logits are at most 20."""
    return ulps(2 * num_rows * 5 * (num_columns + 4), 20, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_and_correlation_are_those_of_scipy(temperature: float) -> None:
    pairs = [
        (softmax(row / temperature), softmax(stored / temperature))
        for row, stored in zip(EXACT.astype(np.float64), STORED.astype(np.float64), strict=True)
    ]
    kl = sum(rel_entr(p, q).sum() for p, q in pairs)
    assert kl_sum(EXACT, STORED, temperature) == pytest.approx(kl, rel=0, abs=rounding(*EXACT.shape))
    pearson = sum(1 - pearsonr(p, q)[0] for p, q in pairs)
    assert pearson_sum(EXACT, STORED, temperature) == pytest.approx(pearson, rel=0, abs=rounding(*EXACT.shape))


def test_cosines_are_those_of_a_loop_and_1_for_equal_rows() -> None:
    expected = sum(
        float(np.dot(a, b)) / np.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))
        for a, b in zip(EXACT.astype(np.float64), STORED.astype(np.float64), strict=True)
    )
    assert cosine_sum(EXACT, STORED) == pytest.approx(expected, rel=0, abs=rounding(*EXACT.shape))
    zeros = np.zeros((3, 4), np.float32)
    assert cosine_sum(zeros, zeros) == 3
    assert cosine_sum(zeros, zeros + 1) == 0


def test_equal_logits_have_no_distance_even_if_all_classes_are_equal() -> None:
    alike = np.ones((2, 5), np.float32)
    for values in (EXACT, alike):
        assert kl_sum(values, values, 2.0) == pearson_sum(values, values, 2.0) == 0
    assert pearson_sum(alike, EXACT[:2, :5], 2.0) == 2


def test_commits_and_inspect_have_the_distance_of_stored_rows_from_those_of_an_exact_cache(
    tiny_config: TinyConfig, built_cache: TinyCache
) -> None:
    packed = open_built(tiny_config(cache={"logits": "topk:2", "embeddings": "int8"}))
    exact, url = open_cache(built_cache.url), packed.url
    ids = [f"digits-01/digit-{number:04d}" for number in range(20, 35)]
    (row,) = np.flatnonzero(sample_keys(0, ids)[:, 0] % np.uint64(64) == 0)
    columns = [(exact.view("digits-01", view), packed.view("digits-01", view)) for view in range(3)]
    fold = StatisticsFold(Classification())
    for commit in read_commits(url):
        if not commit.block.is_eval:
            fold.add(commit.statistics)
    total = fold.result()
    assert total.fidelity_rows == 3
    p, q = ([softmax(pair[side].decoded("logits")[row].astype(np.float64)) for pair in columns] for side in (0, 1))
    kl = sum(rel_entr(a, b).sum() for a, b in zip(p, q, strict=True))
    assert total.kl_sum["1.0"] == pytest.approx(kl, rel=0, abs=rounding(3, 10))
    pearson = sum(1 - pearsonr(a, b)[0] for a, b in zip(p, q, strict=True))
    assert total.pearson_sum["1.0"] == pytest.approx(pearson, rel=0, abs=rounding(3, 10))
    assert total.argmax_flips == 0
    cosines = sum(cosine_sum(*(side.decoded("embedding")[[row]] for side in pair)) for pair in columns)
    assert total.embedding_cosine_sum == pytest.approx(cosines, rel=0, abs=rounding(3, 7))
    assert 2.99 < cosines < 3
    report = inspect_cache(url)
    assert report.outputs == {"logits": "topk:2 [10], 12 bytes a row", "embedding": "int8 [7], 15 bytes a row"}
    assert report.kl_nats.keys() == report.pearson.keys() == {"1.0", "2.0", "4.0"}
    assert 0 < report.kl_nats["1.0"] < 0.1
    assert report.argmax_flips == 0
    assert report.embedding_cosine is not None
    assert 0.99 < report.embedding_cosine < 1


def test_inspect_omits_the_fidelity_of_outputs_that_are_not_stored(tiny_config: TinyConfig) -> None:
    section = {"logits": "none", "embeddings": "none", "class_means": "none"}
    report = inspect_cache(open_built(tiny_config(views={"count": 1}, cache=section)).url)
    assert report.outputs == report.kl_nats == report.pearson == {}
    assert report.argmax_flips is report.embedding_cosine is None


@pytest.mark.parametrize("kind", ["int8", "topk:3"])
def test_the_fidelity_of_a_map_is_the_mean_over_its_positions(kind: str) -> None:
    """Of 2 maps of 8,190 positions each second one is measured: positions 0, 2, 4 …"""
    task = task_of(DataConfig.model_validate({"task": "segmentation", "num_classes": 11}))
    (output,) = stored_outputs([OutputSpec("logits", (11, 90, 91), kind)])
    exact = np.random.default_rng(0).normal(0, 3, (2, 11, 90, 91)).astype(np.float32)
    # Sample ids that are measured.
    ids = [name for name in map(str, range(1000)) if sample_keys(0, [name])[0, 0] % np.uint64(64) == 0][:2]
    counted = StatisticsSum([output], task)
    counted.add_fidelity(RowIdentity(ids, 0), {"logits": exact})
    statistics = counted.result()
    assert statistics.fidelity_rows == 2
    for temperature in (1.0, 2.0, 4.0):
        stored = decode(encode(exact, output), output, temperature=temperature)
        chosen = [values.reshape(2, 11, -1)[:, :, ::2].transpose(0, 2, 1).reshape(-1, 11) for values in (exact, stored)]
        p, q = (softmax(values.astype(np.float64) / temperature, axis=1) for values in chosen)
        num_positions, bound = 45 * 91, rounding(2, 11)
        kl = rel_entr(p, q).sum() / num_positions
        assert statistics.kl_sum[str(temperature)] == pytest.approx(kl, rel=0, abs=bound)
        pearson = (1 - pearsonr(p, q, axis=1)[0]).sum() / num_positions
        assert statistics.pearson_sum[str(temperature)] == pytest.approx(pearson, rel=0, abs=bound)
    first = decode(encode(exact, output), output)
    flips = (exact.argmax(1) != first.argmax(1)).reshape(2, -1)[:, ::2].sum() / num_positions
    assert statistics.argmax_flips == pytest.approx(flips)
    assert (flips > 0) == (kind == "int8")
    assert mean_fidelity_of_maps(statistics) == pytest.approx((flips / 2, statistics.kl_sum["1.0"] / 2))


def mean_fidelity_of_maps(statistics: Statistics) -> tuple[float, float]:
    data = DataConfig.model_validate({"task": "segmentation", "num_classes": 11})
    (output,) = stored_outputs([OutputSpec("logits", (11, 90, 91), "int8")])
    header = Header.model_construct(data={**index_settings(data)}, outputs=(output,))
    means = mean_fidelity(header, statistics)
    return means["argmax_flips"], means["kl_nats"]["1.0"]
