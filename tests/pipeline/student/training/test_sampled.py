"""``cache.logits: sampled:n@T``: the same bytes when built, extended and converted; read by kd at T alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from pipeline.cache.build.manifest import read_manifest
from pipeline.cache.derive.average import AverageRequest, average
from pipeline.cache.derive.convert import convert
from pipeline.cache.format.codec import RowIdentity, decode, encode
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.ops.relabel import relabel
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.cache.verify.recomputation import distance
from pipeline.student.cached_dataset import CachedDataset
from pipeline.student.training.config_checks import check_plan, check_training
from pipeline.student.training.trainer import train
from schemas.cache_format import Output
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.cache.format.codec.kinds import identity_of, logits_output, teacher_like
from tests.pipeline.cache.plan.test_build_plan import warnings_of
from tests.pipeline.caches import TinyCache, build, cache_section, copy_of, files
from tests.pipeline.conftest import TinyConfig, build_tiny
from tests.pipeline.heads import heads_config
from tests.pipeline.student.runs import losses, run_config

KD_AT_2 = [{"name": "kd", "temperature": 2.0}]
CROPS = {"kind": "crop", "count": 3}


@pytest.fixture(scope="module")
def sampled(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """Three views of 10 classes, of which a row has three or more. Never written to."""
    url = str(tmp_path_factory.mktemp("sampled") / "cache")
    cache = {"logits": "sampled:3@2", "views_per_part": 1, "embeddings": "none", "class_means": "none"}
    with pytest.MonkeyPatch.context() as patch:
        # Measures the fidelity of every row.
        patch.setattr("pipeline.cache.build.statistics._SAMPLE_ONE_IN", 1)
        return build_tiny(digits_shards, url, {"views": CROPS, "cache": cache})


@pytest.fixture(scope="module")
def exact(sampled: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """The same in fp32."""
    keys = {"url": str(tmp_path_factory.mktemp("exact") / "cache"), "logits": "fp32"}
    config = sampled.config.model_copy(update={"cache": cache_section(sampled.config).model_copy(update=keys)})
    build(config)
    return TinyCache(keys["url"], config)


def output_of(url: str) -> Output:
    output = open_cache(url).header.output("logits")
    assert output is not None
    return output


def test_rows_are_those_of_the_exact_logits_by_sample_and_view(sampled: TinyCache, exact: TinyCache) -> None:
    stored, logits, output = open_cache(sampled.url), open_cache(exact.url), output_of(sampled.url)
    assert (output.encoding, output.temperatures) == ("sampled", (2.0,))
    for shard in stored.shards:
        sample_ids = [f"{shard.shard_id}/{key}" for key in stored.index(shard).keys.to_pylist()]
        for view in range(3):
            exact_NK = logits.view(shard.shard_id, view).decoded("logits")
            expected = encode(exact_NK, output, identity=RowIdentity(sample_ids, view))
            assert stored.view(shard.shard_id, view).outputs["logits"].column.equals(expected)
    assert verify_cache(sampled.url).problems == []


def test_further_views_leave_the_parts_of_the_first_as_they_are(sampled: TinyCache, tmp_path: Path) -> None:
    section = cache_section(sampled.config).model_copy(update={"url": str(tmp_path / "cache")})
    for count in (2, 3):
        views = sampled.config.views.model_copy(update={"count": count})
        build(sampled.config.model_copy(update={"views": views, "cache": section}))
    parts, expected = (
        {path: data for path, data in files(url).items() if path.startswith("parts/")}
        for url in (section.url, sampled.url)
    )
    assert len(expected) == 2 * 3
    assert parts == expected


def test_fidelity_is_argmax_and_total_variation_of_single_rows(sampled: TinyCache, exact: TinyCache) -> None:
    stored, logits = open_cache(sampled.url), open_cache(exact.url)
    distance_sum, flips, rows = 0.0, 0, 0
    for shard in stored.shards:
        for view in range(3):
            q_NK = softmax(stored.view(shard.shard_id, view).outputs["logits"].decode(temperature=2.0) / 2.0, axis=1)
            p_NK = softmax(logits.view(shard.shard_id, view).decoded("logits").astype(np.float64) / 2.0, axis=1)
            distance_sum += 0.5 * float(np.abs(p_NK - q_NK).sum())
            flips += int((p_NK.argmax(1) != q_NK.argmax(1)).sum())
            rows += len(p_NK)
    statistics, report = stored.manifest.statistics, inspect_cache(sampled.url)
    assert (statistics.fidelity_rows, statistics.argmax_flips) == (rows, flips)
    assert statistics.total_variation_sum == pytest.approx(distance_sum, rel=1e-5)
    assert report.total_variation == pytest.approx(distance_sum / rows, rel=1e-5)
    # A KL divergence of rows without most classes is infinite, and zeros would be those of equal logits.
    assert statistics.kl_sum == statistics.pearson_sum == report.kl_nats == report.pearson == {}
    assert inspect_cache(exact.url).total_variation is None


def test_kd_trains_at_the_temperature_on_the_decoded_rows(sampled: TinyCache, tmp_path: Path) -> None:
    config = run_config(sampled.config, tmp_path / "run", loss=KD_AT_2, train={"epochs": 1, "lr": 1e-9})
    assert check_training(config) == []
    train(config)
    with closing(CachedDataset(sampled.url, global_batch_size=8, tail="short", temperatures=(2.0,))) as dataset:
        batch = dataset[0]
        cache, logits_BK = open_cache(sampled.url), batch.teacher_logits(temperature=2.0).numpy()
    stored = {
        f"{shard.shard_id}/{key}": row_K
        for shard in cache.shards
        for key, row_K in zip(
            cache.index(shard).keys.to_pylist(),
            cache.view(shard.shard_id, 0).outputs["logits"].decode(temperature=2.0),
            strict=True,
        )
    }
    np.testing.assert_array_equal(logits_BK, [stored[sample_id] for sample_id in batch.sample_ids])
    assert np.isfinite(losses(tmp_path / "run")).all()
    with raises("cache.other-temperature", got="T = 1"):
        CachedDataset(sampled.url)


REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"name": "dist", "temperature": 2.0}], "loss.needs-all-classes"),
    ([{"name": "hard"}], "loss.needs-all-classes"),
    ([*KD_AT_2, {"name": "dkd", "temperature": 2.0}], "loss.needs-all-classes"),
    ([{"name": "kd", "temperature": 1.0}], "cache.other-temperature"),
    ([*KD_AT_2, {"name": "kd", "temperature": 4.0}], "cache.other-temperature"),
]


@pytest.mark.parametrize(("loss", "code"), REFUSED, ids=str)
def test_other_losses_and_temperatures_are_refused_before_a_build_and_before_a_training(
    sampled: TinyCache, tmp_path: Path, loss: list[dict[str, Any]], code: str
) -> None:
    config = run_config(sampled.config, tmp_path / "run", loss=loss)
    for refuse in (train, check_training):
        with raises(code, where=sampled.url) as caught:
            refuse(config)
        assert caught.value.next_step
    tree = sampled.config.model_dump(mode="json", exclude_unset=True)
    with raises(code, where="cache.logits"):
        check_plan(run_config(Config.model_validate(tree), tmp_path / "run", loss=loss, cache=tree["cache"]))
    assert not (tmp_path / "run").exists()


def test_an_online_teacher_has_exact_logits_for_all_losses(sampled: TinyCache, tmp_path: Path) -> None:
    """As for any encoding of stored logits: the student of an online run sees what the teacher computes."""
    cache = cache_section(sampled.config).model_dump(include={"url", "logits"})
    config = run_config(
        sampled.config, tmp_path / "run", mode="online", cache=cache, loss=[{"name": "dist"}], train={"epochs": 1}
    )
    check_training(config)


def test_samples_are_not_decoded_for_other_encodings_averages_or_accuracies(
    sampled: TinyCache, exact: TinyCache, tmp_path: Path
) -> None:
    with raises("cache.not-convertible"):
        convert(sampled.url, str(tmp_path / "converted"), encodings={"logits": "fp16"})
    with raises("cache.not-convertible"):
        average([exact.url, sampled.url], str(tmp_path / "average"), AverageRequest((1, 1), None, "fp16"))
    url = str(tmp_path / "fewer")
    assert convert(sampled.url, url, encodings={}, num_views=2).num_views == 2
    relabelled = copy_of(sampled, tmp_path / "cache").url
    assert inspect_cache(relabelled).teacher_top1 is not None
    relabel(relabelled)
    assert inspect_cache(relabelled).teacher_top1 is None


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_an_average_is_sampled_at_the_temperature_of_its_probabilities(
    exact: TinyCache, tmp_path: Path, temperature: float | None
) -> None:
    teacher = exact.config.teacher.model_copy(update={"kwargs": {"depth": 8, "widths": [4, 4, 6, 9]}})
    keys = {"url": str(tmp_path / "other")}
    section = cache_section(exact.config).model_copy(update=keys)
    build(exact.config.model_copy(update={"teacher": teacher, "cache": section}))
    sources = (exact.url, keys["url"])
    for kind in ("sampled:3@2", "fp32"):
        average(sources, str(tmp_path / kind), AverageRequest((1, 1), temperature, kind))
    url = str(tmp_path / "sampled:3@2")
    assert verify_cache(url).problems == []
    means = open_cache(str(tmp_path / "fp32")).view("digits-00", 1).outputs["logits"]
    mean_NK = means.decode(temperature=2.0)
    index = open_cache(url).index(open_cache(url).shards[0])
    expected = encode(mean_NK, output_of(url), identity=RowIdentity(index.sample_ids(index.ok), 1))
    got = open_cache(url).view("digits-00", 1).outputs["logits"]
    np.testing.assert_allclose(
        softmax(got.decode(temperature=2.0) / 2, axis=1),
        softmax(type(got)(expected, output_of(url)).decode(temperature=2.0) / 2, axis=1),
        atol=1e-3,
    )
    assert read_manifest(url)[0].statistics.kl_sum == {}
    if temperature is not None:
        with raises("config.average-temperature", got="sampled:3@4, --temperature 2"):
            average(sources, str(tmp_path / "refused"), AverageRequest((1, 1), temperature, "sampled:3@4"))


@pytest.mark.parametrize("kind", ["sampled:2@1", "topk:2"])
def test_a_multilabel_head_is_not_converted_to_a_part_of_its_classes(
    built_cache: TinyCache, tmp_path: Path, kind: str
) -> None:
    config = heads_config(built_cache.config, tmp_path / "heads", views=CROPS, class_means="none")
    build(config)
    with raises("config.multilabel-topk"):
        convert(cache_section(config).url, str(tmp_path / "converted"), encodings={"logits": kind})


def test_fewer_than_ten_views_give_a_warning(tiny_config: TinyConfig) -> None:
    for count, logits, warns in ((9, "sampled:3@2", True), (10, "sampled:3@2", False), (9, "fp16", False)):
        config = tiny_config(views={"count": count}, cache={"logits": logits})
        assert ("cache.logits=sampled:3@2 stores samples" in warnings_of(config)) == warns


def test_on_another_machine_other_samples_of_the_same_probabilities_pass() -> None:
    output, new = logits_output("sampled:8@1", 300), teacher_like(6, 300)
    drifted = new + np.random.default_rng(0).uniform(-0.01, 0.01, new.shape).astype(np.float32)
    identity = identity_of(new)

    def stored(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return decode(encode(values, output, identity=identity), output)

    def compare(values: NDArray[np.float32], *, same: bool) -> list[bool]:
        same_N = np.full(6, same)
        off, allowed = distance(stored(values), new, output, drift=0.01, same_N=same_N, identity=identity)
        return (off <= allowed).tolist()

    assert compare(new, same=True) == [True] * 6
    assert not all(compare(drifted, same=True))
    assert compare(drifted, same=False) == [True] * 6
    # Another image.
    assert not any(compare(np.roll(new, 1, axis=0), same=False))
