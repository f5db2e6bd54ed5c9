"""Averages of teachers: numpy's float64 means, served at one temperature where they are of probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy.special import expit, softmax

from pipeline.cache.build.manifest import read_manifest
from pipeline.cache.derive.average import AverageRequest, average, left_out
from pipeline.cache.derive.convert import convert
from pipeline.cache.format import layout
from pipeline.cache.ops.relabel import relabel
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import compare_with_sources, verify_cache
from pipeline.shards.writer import pack_shards
from pipeline.student.training.trainer import train
from schemas.config import TeacherConfig
from stillroom import CachedDataset
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section, copy_of, digit_samples, files
from tests.pipeline.conftest import tiny_config_of
from tests.pipeline.heads import build_heads, heads_config
from tests.pipeline.student.runs import rewrite_view, run_config, set_cell
from tests.tolerances import ulps

CROPS: dict[str, Any] = {"kind": "crop", "count": 2}


@pytest.fixture(scope="module")
def teachers(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[TinyCache]:
    """Two teachers of different width over the same two views. Never written to."""
    caches: list[TinyCache] = []
    for name, widths in (("narrow", [4, 4, 6, 7]), ("wide", [4, 4, 6, 9])):
        url = str(tmp_path_factory.mktemp("average") / name)
        kwargs = {"kwargs": {"depth": 8, "widths": widths}}
        config = tiny_config_of(digits_shards, url, {"views": CROPS, "teacher": kwargs})
        build(config)
        caches.append(TinyCache(url, config))
    return caches


def averaged(caches: list[TinyCache], folder: Path, **options: Any) -> str:
    keys: dict[str, Any] = {"weights": (1.0,) * len(caches), "temperature": None, "logits": "fp32", **options}
    average([cache.url for cache in caches], str(folder / "average"), AverageRequest(**keys))
    return str(folder / "average")


def logits(url: str, shard: str, view: int, temperature: float = 1.0) -> NDArray[np.float64]:
    return open_cache(url).view(shard, view).outputs["logits"].decode(temperature=temperature).astype(np.float64)


def is_whole(url: str, caches: list[TinyCache]) -> bool:
    report = verify_cache(url)
    compare_with_sources(url, [cache.url for cache in caches], report)
    assert not report.problems, report.problems
    return report.ok


def test_the_mean_of_logits_is_the_weighted_one_of_float64(teachers: list[TinyCache], tmp_path: Path) -> None:
    url = averaged(teachers, tmp_path, weights=(3.0, 1.0))
    for shard in ("digits-00", "digits-01"):
        for view in (0, 1):
            narrow, wide = (logits(cache.url, shard, view) for cache in teachers)
            np.testing.assert_array_equal(logits(url, shard, view), (0.75 * narrow + 0.25 * wide).astype(np.float32))
    cache = open_cache(url)
    assert (cache.num_views, cache.header.output("embedding"), cache.manifest.class_means) == (2, None, None)
    assert cache.header.fingerprint not in {read_manifest(source.url)[0].fingerprint for source in teachers}
    assert is_whole(url, teachers)
    sources = [open_cache(source.url) for source in teachers]
    assert left_out(sources) == {"embedding": 2, "class means": 2, "eval pass": 2}
    assert left_out([cache]) == {}


def test_hits_are_those_of_the_average(teachers: list[TinyCache], tmp_path: Path) -> None:
    cache = open_cache(averaged(teachers, tmp_path))
    hits = 0
    for shard in cache.shards:
        index = cache.index(shard)
        for view in (0, 1):
            largest = logits(cache.url, shard.shard_id, view).argmax(1)
            hits += int((largest == index.ok_targets["label"]).sum())
    assert (cache.manifest.statistics.top1_hits, cache.manifest.statistics.labelled) == (hits, 70)


def test_probabilities_at_a_temperature_are_those_of_scipy(teachers: list[TinyCache], tmp_path: Path) -> None:
    url = averaged(teachers, tmp_path, weights=(1.0, 3.0), temperature=4.0)
    narrow, wide = (softmax(logits(cache.url, "digits-00", 1) / 4, axis=1) for cache in teachers)
    got = softmax(logits(url, "digits-00", 1, temperature=4.0) / 4, axis=1)
    np.testing.assert_allclose(got, 0.25 * narrow + 0.75 * wide, rtol=1e-6)
    assert is_whole(url, teachers)


def test_the_probabilities_of_a_multilabel_head_are_sigmoids(tmp_path: Path, built_cache: TinyCache) -> None:
    caches: list[TinyCache] = []
    for name, widths in (("narrow", [4, 4, 6, 7]), ("wide", [4, 4, 6, 9])):
        config = heads_config(built_cache.config, tmp_path / name, views=CROPS, class_means="none")
        teacher = config.teacher.model_copy(update={"kwargs": {"depth": 8, "widths": widths}})
        caches.append(build_heads(config.model_copy(update={"teacher": teacher})))
    url = averaged(caches, tmp_path, weights=(3.0, 1.0), temperature=2.0)

    def probabilities(url: str, head: str, function: Any) -> NDArray[np.float64]:
        output = open_cache(url).view("heads-0", 1).outputs[f"logits.{head}"]
        return function(output.decode(temperature=2.0).astype(np.float64) / 2)

    for head, function in (("tags", expit), ("pair", lambda values: softmax(values, axis=1))):
        narrow, wide = (probabilities(cache.url, head, function) for cache in caches)
        # Logits are stored in float32.
        np.testing.assert_allclose(probabilities(url, head, function), 0.75 * narrow + 0.25 * wide, rtol=ulps(16))


def test_other_temperatures_are_refused_by_code(teachers: list[TinyCache], tmp_path: Path) -> None:
    url = averaged(teachers, tmp_path, temperature=2.0)
    with raises("cache.other-temperature", expected="T = 2"):
        logits(url, "digits-00", 0)
    with raises("cache.other-temperature", got="T = 1"):
        CachedDataset(url)
    base = teachers[0].config.model_copy(update={"cache": None})
    data = {"cache": url}
    plain = base.model_copy(update={"teacher": TeacherConfig.model_validate({})})
    for temperature in (4.0, 2.0):
        config = run_config(
            plain, tmp_path / "run", data=data, loss=[{"name": "kd", "temperature": temperature}], train={"epochs": 1}
        )
        if temperature == 2.0:
            assert train(config)["steps"] == 5
        else:
            with raises("cache.other-temperature", got="T = 4"):
                train(config)
    with raises("cache.not-convertible"):
        convert(url, str(tmp_path / "converted"), encodings={"logits": "fp16"})
    # The order of the classes is the same at any temperature.
    hits = open_cache(url).manifest.statistics.top1_hits
    relabel(url)
    # Hits of relabelled caches are those of view 0.
    assert 0 < open_cache(url).manifest.statistics.top1_hits <= hits


def test_other_pixels_views_or_samples_are_refused(teachers: list[TinyCache], tmp_path: Path) -> None:
    changed = copy_of(teachers[1], tmp_path / "copy")
    rewrite_view(changed, "digits-00", 1, set_cell("pixel_digest", 0, b"0" * 16))
    with raises("cache.average-differs", got="columns pixel_digest"):
        averaged([teachers[0], changed], tmp_path)
    other = tiny_config_of(
        [str(url) for url in teachers[0].config.data.shards or ()],
        str(tmp_path / "seed"),
        {"views": {**CROPS, "seed": 5, "count": 1}},
    )
    build(other)
    with raises("cache.average-differs") as caught:
        averaged([teachers[0], TinyCache(cache_section(other).url, other)], tmp_path / "b")
    assert "views.seed: 0 -> 5" in str(caught.value.got)
    for weights in ((1.0, 0.0), (1.0, 2.0, 3.0)):
        with raises("config.average-weights", expected="2 numbers"):
            averaged(teachers, tmp_path / "c", weights=weights)
    with raises("config.too-few-sources"):
        averaged(teachers[:1], tmp_path / "c")


def test_a_repeated_average_continues_to_the_same_bytes(teachers: list[TinyCache], tmp_path: Path) -> None:
    url = averaged(teachers, tmp_path, logits="int8")
    expected = files(url)
    for path in (layout.MANIFEST, "commits/digits-01/v0000-0001.json"):
        Path(url, path).unlink()
    assert files(averaged(teachers, tmp_path, logits="int8")) == expected
    with raises("cache.other-header"):
        averaged(teachers, tmp_path, logits="int8", weights=(2.0, 1.0))


def test_a_shard_without_a_usable_image_has_empty_parts(tmp_path: Path) -> None:
    """They have the columns of the others; so has a conversion of the average."""
    samples = [
        (key, members if row < 3 else {**members, "png": b"bad"}) for row, (key, members) in enumerate(digit_samples(6))
    ]
    shards = pack_shards(samples, f"{tmp_path}/digits-%02d.tar", shard_size=3)
    caches: list[TinyCache] = []
    for width in (7, 9):
        sections: dict[str, Any] = {
            "views": CROPS,
            "data": {"bad_samples": "skip", "max_bad_share": 1.0},
            "teacher": {"kwargs": {"depth": 8, "widths": [4, 4, 6, width]}},
        }
        config = tiny_config_of(shards, str(tmp_path / f"of-{width}"), sections)
        build(config)
        caches.append(TinyCache(cache_section(config).url, config))
    url = averaged(caches, tmp_path, logits="fp16")
    assert is_whole(url, caches)
    convert(url, str(tmp_path / "int8"), encodings={"logits": "int8"})
    assert verify_cache(str(tmp_path / "int8")).ok
    for cache in (open_cache(url), open_cache(str(tmp_path / "int8"))):
        assert [len(cache.view(shard.shard_id, 1).row_N) for shard in cache.shards] == [3, 0]
        parts = [pq.read_schema(path) for path in sorted(Path(cache.url, "parts").rglob("v*.parquet"))]
        assert len(parts) == 2
        assert parts[0].equals(parts[1])
